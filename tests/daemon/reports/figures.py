"""The figures in a file for Prometheus, read by Prometheus' own parser."""

from pathlib import Path

from prometheus_client.parser import text_fd_to_metric_families

Figures = dict[tuple[str, ...], float]  # name and label values


def figures(file: Path, state_dir: Path | None = None) -> Figures:
    """Read a file as Prometheus does; every figure is explained, has a type and tells whose it is."""
    found: Figures = {}
    with file.open() as text:
        for family in text_fd_to_metric_families(text):
            assert family.documentation
            assert family.type in ("gauge", "counter")
            for sample in family.samples:
                *labels, (last, state_dir) = sample.labels.items()
                assert (last, state_dir) == ("state_dir", str(state_dir or file.parent / "state"))
                found[(sample.name.removeprefix("framepackd_"), *dict(labels).values())] = sample.value
    return found
