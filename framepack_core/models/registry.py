"""Lists the models, and finds or downloads their files. No torch here."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from framepack_core.errors import ModelError, RequestError
from framepack_core.media.sizes import BUCKETS, Size
from framepack_core.models import weight_files
from framepack_core.sections import Kind

Components = dict[str, tuple[str, ...]]  # folder -> the files that it needs besides weights

BASE_COMPONENTS: Components = {
    "text_encoder": ("config.json",),
    "text_encoder_2": ("config.json",),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
    "tokenizer_2": ("vocab.json", "merges.txt"),
    "vae": ("config.json",),
}
IMAGE_COMPONENTS: Components = {
    "image_encoder": ("config.json",),
    "feature_extractor": ("preprocessor_config.json",),
}
TRANSFORMER_COMPONENTS: Components = {".": ("config.json",)}
WEIGHTS = ("text_encoder", "text_encoder_2", "vae", "image_encoder", ".")
HIDDEN = [".*", "*/.*"]  # in a repository, such as macOS's ._model.safetensors
FILES = (".safetensors", ".sft", ".gguf", ".ckpt")  # names of repositories do not end like that


@dataclass(frozen=True)
class Source:
    """A repository on the Hugging Face hub, a local folder, or a local file of a transformer's weights."""

    location: str  # "org/name", or the path of a folder or file
    revision: str | None = None  # commit, tag or branch on the hub

    @property
    def is_local(self) -> bool:
        """Whether it is a path, not a hub id: it starts like one, exists, or ends like a file of weights."""
        path = self.location.startswith(("/", "./", "../", "~")) or self.location.lower().endswith(FILES)
        return path or Path(self.location).exists()

    @property
    def folder(self) -> Path:
        """The local folder or file; for a folder of the hub's cache, its snapshot."""
        return _snapshot(Path(self.location).expanduser(), self.revision or "main")

    def __str__(self) -> str:
        """Name it as an error message should."""
        return self.location if self.revision is None else f"{self.location}@{self.revision}"


def is_hub_folder(path: Path) -> bool:
    """Return whether the hub's client keeps a repository, with all its revisions, in this folder."""
    return path.name.startswith("models--") and (path / "snapshots").is_dir()


def _snapshot(path: Path, revision: str) -> Path:
    """Give the folder of a revision, if ``path`` is a repository in the hub's cache; else ``path``.

    For ``main`` without a reference, the only snapshot is used; if there are several, ``path`` is returned.
    """
    path = path.parent if path.name == "snapshots" else path
    if not is_hub_folder(path):
        return path
    reference = path / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshots = [entry for entry in (path / "snapshots").iterdir() if not entry.name.startswith(".")]
    named = [entry for entry in snapshots if entry.name == commit]
    (found,) = named or (snapshots if len(snapshots) == 1 and revision == "main" else [path])
    return found


@dataclass(frozen=True)
class ModelSpec:
    """A model that jobs can name: its direction and its three repositories."""

    name: str
    kind: Kind
    transformer: Source
    base: Source  # text encoders, tokenizers, VAE
    image_encoder: Source
    buckets: tuple[Size, ...] = BUCKETS
    mag_ratios: Path | None = None  # the user's calibration of MagCache; None: the built-in one of the kind

    def verify(
        self,
        *,
        end_image: bool,
        keyframes: bool = False,
        continues: bool = False,
        others: Iterable["ModelSpec"] = (),
    ) -> None:
        """Check that the model's direction fits the request; the error names those of ``others`` that do.

        Raises:
            RequestError: the model generates forward and the request has an end frame or keyframes, or it
                generates backward and the request extends a video.
        """
        if self.kind != "f1" and continues:
            raise RequestError(
                f"model {self.name} generates backward and cannot extend a video: use {of_kind('f1', others)}"
            )
        if self.kind == "f1" and (end_image or keyframes):
            raise RequestError(
                f"model {self.name} generates forward and cannot aim at an end frame or keyframes: "
                f"use {of_kind('framepack', others)}, or leave them out"
            )


def of_kind(kind: Kind, models: Iterable[ModelSpec]) -> str:
    """Name the models of a kind in a message: ``a model of kind f1 (demo-f1, f1)``."""
    names = ", ".join(sorted(model.name for model in models if model.kind == kind))
    return f"a model of kind {kind}" + (f" ({names})" if names else "")


_BASE = Source("hunyuanvideo-community/HunyuanVideo", "e8c2aaa66fe3742a32c11a6766aecbf07c56e773")
_IMAGE_ENCODER = Source("lllyasviel/flux_redux_bfl", "45b801affc54ff2af4e5daf1b282e0921901db87")
_DEMO = str(files("framepack_core").joinpath("demo_model"))
_DEMOS: dict[str, Kind] = {"demo": "framepack", "demo-f1": "f1"}  # the same weights, trained for both kinds
_DEMO_BUCKETS = (
    *((112, 336), (128, 288), (144, 256), (160, 240), (176, 208), (192, 192)),
    *((208, 176), (240, 160), (256, 144), (288, 128), (336, 112)),
)

BUILT_IN = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "framepack",
            "framepack",
            Source("lllyasviel/FramePackI2V_HY", "86cef4396041b6002c957852daac4c91aaa47c79"),
            _BASE,
            _IMAGE_ENCODER,
        ),
        ModelSpec(
            "f1",
            "f1",
            Source("lllyasviel/FramePack_F1_I2V_HY_20250503", "ab239828e0b384fed75580f186f078717d4020f7"),
            _BASE,
            _IMAGE_ENCODER,
        ),
        *(
            ModelSpec(
                name,
                kind,
                Source(f"{_DEMO}/transformer"),
                Source(f"{_DEMO}/base"),
                Source(f"{_DEMO}/image_encoder"),
                buckets=_DEMO_BUCKETS,
            )
            for name, kind in _DEMOS.items()
        ),
    )
}
BUNDLED = frozenset(_DEMOS)


@dataclass(frozen=True)
class ModelFolders:
    """Where the files of a model are on this machine; all of them exist."""

    transformer: Path  # a folder, or the file of its weights
    base: Path
    image_encoder: Path


def find(spec: ModelSpec) -> ModelFolders:
    """Find a model's files on this machine, without the network.

    Raises:
        ModelError: a file is missing; the text names it and says what to do.
    """
    return ModelFolders(*(_locate(source, spec, components) for source, components in parts(spec)))


def download(spec: ModelSpec) -> Iterator[tuple[Source, Path]]:
    """Fetch a model's missing files from the hub; yields each repository when it is complete.

    Raises:
        ModelError: the hub cannot be reached or does not have it.
    """
    from huggingface_hub import snapshot_download

    for source, components in parts(spec):
        if not source.is_local:
            with explained(source, spec):
                # One file at a time: the client keeps nothing of interrupted files (hub.fetch_weights does).
                snapshot_download(
                    source.location,
                    revision=source.revision,
                    allow_patterns=patterns(components),
                    ignore_patterns=HIDDEN,
                    max_workers=1,
                )
        yield source, _locate(source, spec, components)


@contextmanager
def explained(source: Source, spec: ModelSpec) -> Iterator[None]:
    """Turn errors of the hub's client into ModelErrors that say what to do."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except ModelError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"model {spec.name}: the hub has no {source}: check the name and revision in the config"
        ) from error
    except Exception as error:  # network errors come from several libraries
        raise ModelError(
            f"model {spec.name}: {source} could not be fetched ({type(error).__name__}: {error}): "
            "check the network and run the command again; what is here already is kept"
        ) from error


def parts(spec: ModelSpec) -> Iterator[tuple[Source, Components]]:
    """Give the three sources of a model, each with the components that are used."""
    yield spec.transformer, TRANSFORMER_COMPONENTS
    yield spec.base, BASE_COMPONENTS
    yield spec.image_encoder, IMAGE_COMPONENTS


def patterns(components: Components) -> list[str]:
    """Give patterns of the files of a repository that are used; others are not fetched."""
    kinds = ("*.json", "*.safetensors", "*.txt")
    if "." in components:
        return list(kinds)
    return [f"{folder}/{kind}" for folder in components for kind in kinds]


def _locate(source: Source, spec: ModelSpec, components: Components) -> Path:
    folder = source.folder if source.is_local else _in_hub_cache(source, spec, components)
    if is_hub_folder(folder):
        raise ModelError(
            f"model {spec.name}: {folder} has no snapshot of {source.revision or 'main'}, or several: name "
            "one of the folders in its snapshots in the config"
        )
    if folder.is_file() and components != TRANSFORMER_COMPONENTS:
        raise ModelError(
            f"model {spec.name}: {folder} is a file; wanted is a folder that holds {', '.join(components)}: "
            "correct the path in the config, or remove it for the published one"
        )
    lacking = next(missing(folder, components), None)
    if lacking is not None:
        remedy = (
            "put it there, or correct the path in the config"
            if source.is_local
            else f"run: framepackd models download {spec.name}"
        )
        there = weight_files.instead(lacking)
        raise ModelError(f"model {spec.name}: {lacking} is missing: {remedy}{there}")
    return folder


def _in_hub_cache(source: Source, spec: ModelSpec, components: Components) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # The patterns of the download: without them the client would miss the files that were not fetched.
        return Path(
            snapshot_download(
                source.location,
                revision=source.revision,
                allow_patterns=patterns(components),
                ignore_patterns=HIDDEN,
                local_files_only=True,
            )
        )
    except HFValidationError as error:
        raise ModelError(
            f"model {spec.name}: {source} is neither an existing folder nor a hub id (org/name): "
            "correct it in the config"
        ) from error
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        raise ModelError(
            f"model {spec.name}: {source} is not on this machine, or not whole: "
            f"run: framepackd models download {spec.name}"
        ) from error


def missing(folder: Path, components: Components) -> Iterator[Path]:
    """Give the needed files that are missing in the folder of a source.

    Raises:
        ModelError: it is not clear which files hold the weights, or their index is damaged.
    """
    if components == TRANSFORMER_COMPONENTS and is_file(folder):
        yield from weight_files.choose(folder, "transformer").missing
        return
    for component, markers in components.items():
        yield from (
            folder / component / marker for marker in markers if not (folder / component / marker).is_file()
        )
        if component in WEIGHTS:
            part = "transformer" if component == "." else component
            yield from weight_files.choose(folder / component, part).missing


def is_file(place: Path) -> bool:
    """Return whether a path is a file of weights, not a folder; decides by the name if it does not exist."""
    return place.is_file() or (place.suffix.lower() in FILES and not place.is_dir())
