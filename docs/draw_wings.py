"""Draw docs/pictures/wings.svg from the code: ``python -m docs.draw_wings``.

Each box is a wing, or a module beside them. It stands above all that it imports; arrows that others imply are
left out.
"""

from pathlib import Path

from tests.wings import CORE, DAEMON, rooms

PICTURE = Path(__file__).parent / "pictures" / "wings.svg"
WIDTH, BOX, HEIGHT, FLOOR = 1000, 96, 26, 62
STYLE = (
    "text { font: 13px sans-serif; text-anchor: middle; fill: #24292f } "
    "rect { fill: #f6f8fa; stroke: #57606a; rx: 5 } line { stroke: #8c959f; stroke-width: 1 } "
    "@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } rect { fill: #161b22; stroke: #8b949e } "
    "line { stroke: #6e7681 } }"
)


def heights(graph: dict[str, set[str]]) -> dict[str, int]:
    """Give the floor of each room, from 0."""
    found: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in found:
            found[room] = 1 + max(map(height, graph[room] & graph.keys()), default=-1)
        return found[room]

    for room in sorted(graph):
        height(room)
    return found


def reached(graph: dict[str, set[str]], room: str) -> set[str]:
    """Give what a room imports, by way of others too."""
    near = graph[room] & graph.keys()
    return near.union(*(reached(graph, other) for other in near)) if near else set()


def draw(package: str, top: int) -> tuple[list[str], int]:
    """Draw a package below ``top``; gives the lines and where it ends."""
    graph = rooms(package)
    floors = heights(graph)
    highest = max(floors.values())
    places = {}
    for floor in range(highest + 1):
        row = sorted(room for room in graph if floors[room] == floor)
        for number, room in enumerate(row):
            y = top + 40 + (highest - floor) * FLOOR
            places[room] = (round(WIDTH * (number + 1) / (len(row) + 1)), y)
    lines = [f'<text x="{WIDTH // 2}" y="{top + 16}" font-weight="bold">{package}</text>']
    for room in sorted(graph):
        near = graph[room] & graph.keys()
        implied = set().union(*(reached(graph, other) for other in near)) if near else set()
        for other in sorted(near - implied):
            (x, y), (x2, y2) = places[room], places[other]
            lines.append(f'<line x1="{x}" y1="{y + HEIGHT}" x2="{x2}" y2="{y2}"/>')
    for room, (x, y) in sorted(places.items()):
        lines.append(f'<rect x="{x - BOX // 2}" y="{y}" width="{BOX}" height="{HEIGHT}"/>')
        lines.append(f'<text x="{x}" y="{y + 18}">{room}</text>')
    return lines, top + 40 + (highest + 1) * FLOOR


def picture() -> str:
    """Give the picture of both packages."""
    daemon, end = draw(DAEMON, 0)
    core, end = draw(CORE, end + 10)
    body = "\n".join([f"<style>{STYLE}</style>", *daemon, *core])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {end}">\n{body}\n</svg>\n'


if __name__ == "__main__":
    PICTURE.write_text(picture())
