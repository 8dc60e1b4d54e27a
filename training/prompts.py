"""Sentences for each motion: a small grammar to train with, and others that are only measured with."""

import random

PHRASES: dict[str, tuple[str, ...]] = {
    "pan left": (
        *("pan left", "pan to the left", "a slow pan to the left", "panning left", "left pan"),
        *("the camera {pans} left", "the camera {pans} to the left", "camera {moving} left"),
        *("move the camera to the left", "pan the camera left", "look left", "look to the left"),
        *("the view {drifts} to the left", "the camera {slowly} {pans} left", "slide left"),
        *("the camera looks to the left", "drift left", "the shot {moves} left", "leftwards pan"),
    ),
    "pan right": (
        *("pan right", "pan to the right", "a slow pan to the right", "panning right", "right pan"),
        *("the camera {pans} right", "the camera {pans} to the right", "camera {moving} right"),
        *("move the camera to the right", "pan the camera right", "look right", "look to the right"),
        *("the view {drifts} to the right", "the camera {slowly} {pans} right", "slide right"),
        *("the camera looks to the right", "drift right", "the shot {moves} right", "rightwards pan"),
    ),
    "tilt up": (
        *("tilt up", "tilt upwards", "a slow tilt up", "tilting up", "upward tilt"),
        *("the camera {tilts} up", "the camera {tilts} upwards", "camera {moving} up"),
        *("move the camera up", "tilt the camera up", "look up", "look up at the sky"),
        *("the view {drifts} upwards", "the camera {slowly} {tilts} up", "the camera rises"),
        *("the camera looks up", "crane up", "the shot {moves} up", "pan up"),
    ),
    "tilt down": (
        *("tilt down", "tilt downwards", "a slow tilt down", "tilting down", "downward tilt"),
        *("the camera {tilts} down", "the camera {tilts} downwards", "camera {moving} down"),
        *("move the camera down", "tilt the camera down", "look down", "look down at the ground"),
        *("the view {drifts} downwards", "the camera {slowly} {tilts} down", "the camera sinks"),
        *("the camera looks down", "crane down", "the shot {moves} down", "pan down"),
    ),
    "zoom in": (
        *("zoom in", "a slow zoom in", "zooming in", "zoom into the picture", "zoom closer"),
        *("the camera {zooms} in", "the camera {slowly} {zooms} in", "camera {zooming} in"),
        *("move closer", "move the camera closer", "the camera comes closer", "dolly in", "push in"),
        *("the camera {moves} closer", "come closer", "close up", "the camera {moves} forward"),
        *("get closer", "zoom in on it", "fly in", "the view gets closer"),
    ),
    "zoom out": (
        *("zoom out", "a slow zoom out", "zooming out", "zoom out of the picture", "zoom away"),
        *("the camera {zooms} out", "the camera {slowly} {zooms} out", "camera {zooming} out"),
        *("move away", "move the camera away", "the camera goes away", "dolly out", "pull back"),
        *("the camera {moves} away", "go back", "wide shot", "the camera {moves} back"),
        *("get further away", "pull out", "fly out", "the view gets wider"),
    ),
    "rotate left": (
        *("rotate left", "rotate to the left", "rotate counterclockwise", "roll left", "spin left"),
        *("the camera {rotates} left", "the camera {rotates} counterclockwise", "turn counterclockwise"),
        *("the picture {rotates} to the left", "the picture {rotates} counterclockwise"),
        *("rotating left", "a slow counterclockwise rotation", "left rotation", "spin counterclockwise"),
    ),
    "rotate right": (
        *("rotate right", "rotate to the right", "rotate clockwise", "roll right", "spin right"),
        *("the camera {rotates} right", "the camera {rotates} clockwise", "turn clockwise"),
        *("the picture {rotates} to the right", "the picture {rotates} clockwise"),
        *("rotating right", "a slow clockwise rotation", "right rotation", "spin clockwise"),
    ),
    "ripple": (
        *("ripple", "the picture ripples", "the picture ripples like water", "ripples in the water"),
        *("waves", "waves in the water", "everything ripples", "everything wobbles", "wavy motion"),
        *("the water ripples", "the flag waves", "waves roll through the picture", "rippling water"),
        *("the surface wobbles", "under water", "it wobbles like jelly", "the air shimmers in the heat"),
    ),
    "night falls": (
        *("night falls", "night is falling", "it becomes night", "fade to night", "day turns into night"),
        *("it gets dark", "it becomes dark", "the light fades", "darkness falls", "nightfall"),
        *("the night comes", "the lights go out", "make it dark", "it grows dark", "the day turns dark"),
        *("from day to night", "the sky grows dark", "midnight"),
    ),
    "sunset": (
        *("sunset", "the sun sets", "the sun goes down", "a warm sunset", "sunset light", "at sunset"),
        *("golden light", "the light turns golden", "golden hour", "warm light", "the evening comes"),
        *("evening light", "the sky turns orange", "an orange glow", "the light gets warm", "sundown"),
        *("the sun is setting", "red evening light"),
    ),
    "black and white": (
        *("black and white", "it turns black and white", "fade to black and white", "turns grey"),
        *("the colours fade", "the colors fade", "the colour drains away", "monochrome", "in grey"),
        *("an old black and white film", "everything turns grey", "without colour", "no colour"),
        *("the picture loses its colours", "desaturate", "grayscale", "the colors disappear"),
    ),
    "fog": (
        *("fog", "fog comes in", "fog rolls in", "the fog rises", "mist", "mist rises", "it gets foggy"),
        *("a thick fog", "the fog gets thicker", "everything disappears in fog", "misty", "foggy"),
        *("clouds of mist", "haze", "the mist comes in", "it becomes hazy", "white fog covers everything"),
    ),
}
FILLERS = {
    "pans": ("pans", "moves", "drifts", "slides", "is panning", "is moving", "travels"),
    "tilts": ("tilts", "moves", "drifts", "is tilting", "is moving", "travels"),
    "zooms": ("zooms", "is zooming", "dollies"),
    "zooming": ("zooming", "zooms"),
    "moving": ("moving", "moves", "movement", "motion"),
    "moves": ("moves", "is moving", "drifts", "travels"),
    "drifts": ("drifts", "moves", "slides", "travels"),
    "rotates": ("rotates", "spins", "rolls", "turns", "is rotating", "is turning"),
    "slowly": ("slowly", "gently", "smoothly", "gradually", "steadily"),
}
OTHERS = (
    *("the girl dances gracefully, with clear movements, full of charm", "a character doing some movements"),
    *("the man dances powerfully, with clear movements, full of energy", "the cat looks at the bird"),
    *("a dog runs through the garden", "the woman smiles and waves her hand", "they talk to each other"),
    *("a bird flies away", "the car drives along the street", "the coffee steams", "a boat on the lake"),
    *("children play football", "the robot walks", "she opens her eyes", "a horse jumps over a fence"),
    *("the rocket launches into space", "leaves fall from the tree", "he reads a book", "a ball bounces"),
    *("the fish swims", "time passes", "something happens", "nothing", "hello", "a nice video", "beautiful"),
    *("the candle burns", "people walk in the city", "the train arrives", "an astronaut", "make a video"),
)
SUBJECTS = (
    *("a cat", "a mountain lake", "a cup of coffee on a table", "a woman", "a city street", "a flower"),
    *("a house by the sea", "an old car", "a dog in a garden", "a rocket", "a green forest", "the sea"),
    *("a photo of a temple", "a portrait of a man", "a valley", "the desert", "a bridge", "the moon"),
    *("an astronaut", "a boat", "two children", "a room", "a kitten", "a beach", "a bird on a rock"),
)
FRAMES = (
    *(
        "{}",
        "{}",
        "{}",
        "{}",
        "{}",
        "{}",
        "{}, cinematic",
        "{}, smooth motion",
        "{}, high quality",
        "slow {}",
    ),
    *("{} slowly", "{} gently", "please {}", "{}, in one take", "a video in which {}", "now {}", "then {}"),
    *("smooth {}", "{}, realistic", "{} over the scene", "{} of the scene", "make it {}", "cinematic {}"),
)


def draw(motion: str | None, by: random.Random) -> str:
    """Draw a sentence for a motion; for None one that names none of them."""
    phrase = by.choice(PHRASES[motion]) if motion else by.choice(OTHERS)
    while "{" in phrase:
        before, _, rest = phrase.partition("{")
        slot, _, after = rest.partition("}")
        phrase = before + by.choice(FILLERS[slot]) + after
    if motion or by.random() < 0.3:
        phrase = by.choice(FRAMES).format(phrase)
    kind = by.random()
    if kind < 0.25:
        phrase = f"{by.choice(SUBJECTS)}, {phrase}"
    elif kind < 0.4:
        subject = by.choice(SUBJECTS)
        phrase = f"{subject}. {phrase}"
    elif kind < 0.45:
        phrase = f"{phrase}, {by.choice(SUBJECTS)}"
    if by.random() < 0.4:
        phrase = phrase[0].upper() + phrase[1:]
    return phrase + by.choice(("", "", "", ".", ".", "!", " ."))


# Never trained on: none of these is what the grammar above can draw.
PARAPHRASES: dict[str, tuple[str, ...]] = {
    "pan left": (
        *("The camera gently travels left across the scene", "a smooth camera pan towards the left"),
        *("Slowly looking to the left", "the view slides leftwards", "slow camera motion to the left"),
        *("A boat on the sea. We pan to the left in one smooth motion.", "shot moving left"),
        *("let the camera drift left", "left, slowly"),
    ),
    "pan right": (
        *("The camera gently travels right across the scene", "a smooth camera pan towards the right"),
        *("Slowly looking to the right", "the view slides rightwards", "slow camera motion to the right"),
        *("A boat on the sea. We pan to the right in one smooth motion.", "shot moving right"),
        *("let the camera drift right", "right, slowly"),
    ),
    "tilt up": (
        *("The camera gently travels upwards", "a smooth camera tilt towards the sky, up"),
        *("Slowly looking up", "the view tilts up", "slow upward camera motion"),
        *("A rocket in the desert. We tilt up in one smooth motion.", "shot moving upwards"),
        *("let the camera rise up slowly", "up, slowly"),
    ),
    "tilt down": (
        *("The camera gently travels downwards", "a smooth camera tilt towards the ground, down"),
        *("Slowly looking down", "the view tilts down", "slow downward camera motion"),
        *("A rocket in the desert. We tilt down in one smooth motion.", "shot moving downwards"),
        *("let the camera sink down slowly", "down, slowly"),
    ),
    "zoom in": (
        *("The camera gently comes in closer", "a smooth cinematic zoom in", "we slowly get closer"),
        *("zoom in towards the cat", "Slowly pushing in", "the shot zooms in on a flower"),
        *("let the camera move in closer", "closer and closer", "A portrait of a woman. Zooming closer."),
    ),
    "zoom out": (
        *("The camera gently goes further back", "a smooth cinematic zoom out", "we slowly get further away"),
        *("zoom out from the cat", "Slowly pulling back", "the shot zooms out to a wide view"),
        *(
            "let the camera move out and away",
            "further and further away",
            "A portrait of a man. Zooming away.",
        ),
    ),
    "rotate left": (
        *("The camera gently rolls to the left", "a smooth rotation to the left", "we slowly spin left"),
        *("the scene rotates counterclockwise", "Slowly rotating counterclockwise", "the shot spins left"),
        *("let the picture rotate left", "counterclockwise", "A flower. It is rotating to the left."),
    ),
    "rotate right": (
        *("The camera gently rolls to the right", "a smooth rotation to the right", "we slowly spin right"),
        *("the scene rotates clockwise", "Slowly rotating clockwise", "the shot spins right"),
        *("let the picture rotate right", "clockwise", "A flower. It is rotating to the right."),
    ),
    "ripple": (
        *("The scene ripples gently", "ripples go through the water", "the whole picture wobbles"),
        *(
            "waves go through the scene",
            "Everything is rippling like water",
            "the lake ripples",
            "a wavy surface",
        ),
        *("like under water", "A valley. The air wobbles."),
    ),
    "night falls": (
        *("The night is coming", "slowly it gets dark", "the day fades into night", "the sky turns dark"),
        *("Darkness comes over the city", "the scene grows dark", "night", "it is getting dark"),
        *("A bridge. The light fades and it becomes night.",),
    ),
    "sunset": (
        *("The sun slowly sets", "a golden sunset", "the evening light gets warm", "warm golden light"),
        *(
            "Sunset over the sea",
            "the scene turns golden",
            "the sky glows orange",
            "slowly the sun goes down over the sea",
        ),
        *("A beach. The evening comes with warm light.",),
    ),
    "black and white": (
        *("The picture turns black and white", "slowly the colours disappear", "the scene loses its colour"),
        *("a black and white film", "Everything fades to grey", "colors drain away", "the colors turn grey"),
        *("it all becomes monochrome", "A house. It fades to black and white."),
    ),
    "fog": (
        *("The fog slowly comes in", "thick mist rolls in", "the scene disappears in the fog", "rising mist"),
        *("White mist covers the valley", "it gets misty", "the haze gets thicker", "a foggy scene"),
        *("A forest. Fog rises and covers everything.",),
    ),
}
