"""Sentences to train with: a small grammar for each motion."""

import random
import re

from training.paraphrases import PARAPHRASES


def _moves(way: str, verb: str) -> tuple[str, ...]:
    """Give what is said of each motion that has a way to go; ``verb`` names three slots, as "pan" does."""
    return (
        *(f"{{who}} {{{verb}s}} {way}", f"{{who}} {{slowly}} {{{verb}s}} {way}", f"we {{{verb}}} {way}"),
        *(f"{{{verb}}} {way}", f"{{slowly}} {{{verb}}} {way}", f"we {{slowly}} {{{verb}}} {way}"),
        *(f"{{{verb}ing}} {way}", f"{{slowly}} {{{verb}ing}} {way}", f"{{it is}} {{{verb}ing}} {way}"),
        *(f"let {{who}} {{{verb}}} {way}", f"{{it is}} {{slowly}} {{{verb}ing}} {way}"),
    )


def _bare(way: str) -> tuple[str, ...]:
    """Give what is said of a way to go without a verb."""
    return (
        *(way, f"{{slowly}} {way}", f"{way}, {{slowly}}", f"{{slow}} {{movement}} {way}"),
        *(f"{{slow}} camera {{movement}} {way}", f"what is {way}", f"across the {{place}} {way}"),
    )


PHRASES: dict[str, tuple[str, ...]] = {
    "pan left": (
        *("pan left", "pan to the left", "a slow pan to the left", "panning left", "left pan"),
        *("the camera {pans} left", "the camera {pans} to the left", "camera {moving} left"),
        *("move the camera to the left", "pan the camera left", "look left", "look to the left"),
        *("the view {drifts} to the left", "the camera {slowly} {pans} left", "slide left"),
        *("the camera looks to the left", "drift left", "the shot {moves} left", "leftwards pan"),
        *_moves("{left}", "pan"),
        *_bare("{left}"),
        *("{slow} pan {left}", "{slow} left {movement}", "{slow} leftward {movement}"),
    ),
    "pan right": (
        *("pan right", "pan to the right", "a slow pan to the right", "panning right", "right pan"),
        *("the camera {pans} right", "the camera {pans} to the right", "camera {moving} right"),
        *("move the camera to the right", "pan the camera right", "look right", "look to the right"),
        *("the view {drifts} to the right", "the camera {slowly} {pans} right", "slide right"),
        *("the camera looks to the right", "drift right", "the shot {moves} right", "rightwards pan"),
        *_moves("{right}", "pan"),
        *_bare("{right}"),
        *("{slow} pan {right}", "{slow} right {movement}", "{slow} rightward {movement}"),
    ),
    "tilt up": (
        *("{raise} the camera", "{raise} the view", "{who} {climbs}"),
        *("{who} {slowly} {climbs}", "{climbing} {up}"),
        *("the camera is {climbing}", "into the {sky}", "up into the {sky}", "we look up into the {sky}"),
        *("tilt up", "tilt upwards", "a slow tilt up", "tilting up", "upward tilt"),
        *("the camera {tilts} up", "the camera {tilts} upwards", "camera {moving} up"),
        *("move the camera up", "tilt the camera up", "look up", "look up at the sky"),
        *("the view {drifts} upwards", "the camera {slowly} {tilts} up", "the camera rises"),
        *("the camera looks up", "crane up", "the shot {moves} up", "pan up"),
        *_moves("{up}", "tilt"),
        *_bare("{up}"),
        *("{slow} tilt {up}", "{slow} upward {movement}", "{who} {slowly} rises", "rise", "rising camera"),
    ),
    "tilt down": (
        *("{lower} the camera", "{lower} the view", "{who} {drops}", "{who} {slowly} {drops}"),
        *("{dropping} {down}", "the camera is {dropping}", "to the {floor}", "down to the {floor}"),
        *("tilt down", "tilt downwards", "a slow tilt down", "tilting down", "downward tilt"),
        *("the camera {tilts} down", "the camera {tilts} downwards", "camera {moving} down"),
        *("move the camera down", "tilt the camera down", "look down", "look down at the ground"),
        *("the view {drifts} downwards", "the camera {slowly} {tilts} down", "the camera sinks"),
        *("the camera looks down", "crane down", "the shot {moves} down", "pan down"),
        *_moves("{down}", "tilt"),
        *_bare("{down}"),
        *("{slow} tilt {down}", "{slow} downward {movement}", "{who} {slowly} sinks"),
        *("sink", "sinking camera"),
    ),
    "zoom in": (
        *("{approach} {it}", "we {approach} {it}", "{who} approaches {it}"),
        *("a closer look at {it}", "a close view"),
        *("{who} {zooms} in tight", "{slow} push-in on {it}", "let us see {it} closer", "bring {it} closer"),
        *("zoom in", "a slow zoom in", "zooming in", "zoom into the picture", "zoom closer"),
        *("the camera {zooms} in", "the camera {slowly} {zooms} in", "camera {zooming} in"),
        *("move closer", "move the camera closer", "the camera comes closer", "dolly in", "push in"),
        *("the camera {moves} closer", "come closer", "close up", "the camera {moves} forward"),
        *("get closer", "zoom in on it", "fly in", "the view gets closer"),
        *_moves("{in}", "zoom"),
        *("closer", "{slowly} closer", "closer to {it}", "nearer", "ever closer", "closer, always closer"),
        *("{slow} zoom {in}", "{slow} push in", "{who} {slowly} gets closer"),
        *("we get {in}", "{who} comes {in}"),
        *("we {slowly} come {in}", "getting {in}", "coming {in}", "moving {in}", "{who} {moves} {in}"),
    ),
    "zoom out": (
        *("{retreat} from {it}", "we {retreat} from {it}", "{who} retreats from {it}"),
        *("show {more}", "see {more}"),
        *("{who} {zooms} out wide", "{slow} pull-out from {it}"),
        *("step back from {it}", "{who} pulls back {slowly}"),
        *("zoom out", "a slow zoom out", "zooming out", "zoom out of the picture", "zoom away"),
        *("the camera {zooms} out", "the camera {slowly} {zooms} out", "camera {zooming} out"),
        *("move away", "move the camera away", "the camera goes away", "dolly out", "pull back"),
        *("the camera {moves} away", "go back", "wide shot", "the camera {moves} back"),
        *("get further away", "pull out", "fly out", "the view gets wider"),
        *_moves("{out}", "zoom"),
        *("further away", "{slowly} further away", "away from {it}", "farther"),
        *("ever further", "back, always back"),
        *("{slow} zoom {out}", "{slow} pull back", "{who} {slowly} gets further away"),
        *("we get {out}", "{who} goes {out}"),
        *("we {slowly} go {out}", "getting {out}", "going {out}", "moving {out}", "{who} {moves} {out}"),
    ),
    "rotate left": (
        *("rotate left", "rotate to the left", "rotate counterclockwise", "roll left", "spin left"),
        *("the camera {rotates} left", "the camera {rotates} counterclockwise", "turn counterclockwise"),
        *("the picture {rotates} to the left", "the picture {rotates} counterclockwise"),
        *("rotating left", "a slow counterclockwise rotation", "left rotation", "spin counterclockwise"),
        *_moves("{left}", "rotate"),
        *_moves("{counterclockwise}", "rotate"),
        *("{slow} rotation {left}", "{slow} {counterclockwise} {rotation}"),
        *("{slow} roll {left}", "{rotation} {left}"),
        *("{rotation} {counterclockwise}", "{slowly} {counterclockwise}"),
        *("{slow} spin {left}", "{slow} turn {counterclockwise}"),
    ),
    "rotate right": (
        *("rotate right", "rotate to the right", "rotate clockwise", "roll right", "spin right"),
        *("the camera {rotates} right", "the camera {rotates} clockwise", "turn clockwise"),
        *("the picture {rotates} to the right", "the picture {rotates} clockwise"),
        *("rotating right", "a slow clockwise rotation", "right rotation", "spin clockwise"),
        *_moves("{right}", "rotate"),
        *_moves("{clockwise}", "rotate"),
        *("{slow} rotation {right}", "{slow} {clockwise} {rotation}"),
        *("{slow} roll {right}", "{rotation} {right}"),
        *("{rotation} {clockwise}", "{slowly} {clockwise}", "{slow} spin {right}", "{slow} turn {clockwise}"),
    ),
    "ripple": (
        *("{waves} spread over the {place}", "{what} sways in {waves}", "like a reflection in {water}"),
        *("ripple", "the picture ripples", "the picture ripples like water", "ripples in the water"),
        *("waves", "waves in the water", "everything ripples", "everything wobbles", "wavy motion"),
        *("the water ripples", "the flag waves", "waves roll through the picture", "rippling water"),
        *("the surface wobbles", "under water", "it wobbles like jelly", "the air shimmers in the heat"),
        *("{what} {ripples}", "{what} {slowly} {ripples}"),
        *("{what} {is rippling}", "{ripples} through {what}"),
        *("{what} {ripples} like {water}", "{ripples} run through {what}"),
        *("{ripples} in {what}", "ripples on the {water}"),
        *("{what} {ripples} {slowly}", "as if under {water}", "seen through {water}", "{waves} over {what}"),
    ),
    "night falls": (
        *("make it {night}", "make it {dark}", "{night} over the {place}"),
        *("nighttime", "make it nighttime soon"),
        *("the {light} is gone", "the {light} goes out", "dim the {light}", "until it is {dark}"),
        *("night falls", "night is falling", "it becomes night", "fade to night", "day turns into night"),
        *("it gets dark", "it becomes dark", "the light fades", "darkness falls", "nightfall"),
        *("the night comes", "the lights go out", "make it dark", "it grows dark", "the day turns dark"),
        *("from day to night", "the sky grows dark", "midnight"),
        *("{night} {comes}", "{night} {slowly} {comes}"),
        *("{night} {comes} over the {place}", "it becomes {dark}"),
        *("{what} {becomes} {dark}", "{what} {slowly} {becomes} {dark}"),
        *("the {day} {becomes} {night}", "{dark}"),
        *("it is becoming {dark}", "the {day} fades"),
        *("the light {slowly} fades away", "{what} fades into {night}"),
    ),
    "sunset": (
        *("the light of {sun}", "{sun} is low", "make it a sunset", "as at sunset", "{warm} rays of {sun}"),
        *("sunset", "the sun sets", "the sun goes down", "a warm sunset", "sunset light", "at sunset"),
        *("golden light", "the light turns golden", "golden hour", "warm light", "the evening comes"),
        *("evening light", "the sky turns orange", "an orange glow", "the light gets warm", "sundown"),
        *("the sun is setting", "red evening light"),
        *("{sun} {sets}", "{sun} {slowly} {sets}", "{sun} {sets} over the {place}", "{warm} {light}"),
        *("{what} {becomes} {warm}", "{what} {slowly} {becomes} {warm}"),
        *("the sky {becomes} {warm}", "{warm} sunset"),
        *("the {light} {becomes} {warm}", "{what} in {warm} {light}"),
        *("{what} glows {warm}", "the evening falls"),
    ),
    "black and white": (
        *("remove the {colour} from {what}", "take away the {colour}"),
        *("the {colour} is gone", "lose the {colour}"),
        *("an old {grey} photograph", "{what} as an old photograph", "{becomes} {grey} like an old film"),
        *("black and white", "it turns black and white", "fade to black and white", "turns grey"),
        *("the colours fade", "the colors fade", "the colour drains away", "monochrome", "in grey"),
        *("an old black and white film", "everything turns grey", "without colour", "no colour"),
        *("the picture loses its colours", "desaturate", "grayscale", "the colors disappear"),
        *("the {colour} {fades}", "the {colour} {slowly} {fades}"),
        *("{colour} {fades}", "{what} {becomes} {grey}"),
        *("{what} {slowly} {becomes} {grey}", "{what} loses its {colour}"),
        *("{what} without {colour}", "{grey}"),
        *("{what} fades to {grey}", "the {colour} of {what} {fades}"),
        *("all becomes {grey}", "no more {colour}"),
        *("a {grey} film", "it becomes {grey}", "{grey} picture", "the {colour} {becomes} {grey}"),
    ),
    "fog": (
        *("{fog} swallows {what}", "{fog} hides the {place}", "the {fog} thickens", "dense {fog}"),
        *("fog", "fog comes in", "fog rolls in", "the fog rises", "mist", "mist rises", "it gets foggy"),
        *("a thick fog", "the fog gets thicker", "everything disappears in fog", "misty", "foggy"),
        *("clouds of mist", "haze", "the mist comes in", "it becomes hazy", "white fog covers everything"),
        *("{fog} {comes in}", "{fog} {slowly} {comes in}", "{fog} over the {place}", "{fog} covers {what}"),
        *("{what} {becomes} {foggy}", "{what} vanishes in {fog}"),
        *("it is getting {foggy}", "{fog} {comes in} over the {place}"),
        *("{what} in the {fog}", "a {foggy} morning", "{foggy}", "thick {fog} covers the {place}"),
    ),
}
FILLERS = {
    "who": ("the camera", "the camera", "the camera", "camera", "the view", "the shot", "the picture", "it"),
    "it is": ("it is", "we are", "the camera is", "the view is", "the picture is", "the shot is"),
    "slow": ("a slow", "a smooth", "a gentle", "a steady", "slow", "smooth", "gentle", "a"),
    "movement": ("movement", "motion", "move", "drift", "slide"),
    "left": ("left", "left", "to the left", "to the left", "leftwards", "towards the left"),
    "right": ("right", "right", "to the right", "to the right", "rightwards", "towards the right"),
    "up": ("up", "up", "upwards", "upward", "up to the sky", "towards the sky"),
    "down": ("down", "down", "downwards", "downward", "down to the ground", "towards the ground"),
    "in": ("in", "in", "closer", "in closer", "in on {it}", "into {it}", "towards {it}", "nearer"),
    "out": ("out", "out", "away", "back", "out from {it}", "away from {it}", "further away", "further back"),
    "it": ("it", "the cat", "the house", "her face", "the flower", "the middle", "the picture", "the scene"),
    "counterclockwise": ("counterclockwise", "anticlockwise", "counter-clockwise"),
    "clockwise": ("clockwise",),
    "rotation": ("rotation", "roll", "spin", "turn"),
    "pan": ("pan", "pan", "move", "drift", "slide", "travel", "go", "look", "swing", "sweep", "track"),
    "paning": ("panning", "moving", "drifting", "sliding", "travelling", "going", "looking", "swinging"),
    "tilt": ("tilt", "tilt", "move", "drift", "travel", "go", "look"),
    "tilting": ("tilting", "moving", "drifting", "travelling", "going", "looking"),
    "zoom": ("zoom", "zoom", "move", "push", "dolly", "fly", "go"),
    "zooming": ("zooming", "zooming", "zooms", "moving", "pushing", "flying", "going"),
    "rotate": ("rotate", "spin", "roll", "turn"),
    "raise": ("raise", "lift", "slowly raise"),
    "climbs": ("climbs", "rises", "lifts", "ascends"),
    "climbing": ("climbing", "rising", "lifting", "ascending"),
    "sky": ("sky", "clouds", "treetops", "stars"),
    "lower": ("lower", "drop", "slowly lower"),
    "drops": ("drops", "sinks", "lowers", "descends"),
    "dropping": ("dropping", "sinking", "lowering", "descending"),
    "floor": ("floor", "ground", "grass", "street"),
    "approach": ("approach", "slowly approach", "go to", "near"),
    "retreat": ("retreat", "slowly retreat", "back off", "withdraw"),
    "more": ("more of it", "the whole scene", "everything around it", "more of the place"),
    "rotateing": ("rotating", "spinning", "rolling", "turning"),
    "what": (
        *("everything", "the picture", "the scene", "it", "all", "the image"),
        *("the whole picture", "the sky"),
    ),
    "ripples": ("ripples", "wobbles", "waves", "shimmers", "undulates"),
    "is rippling": ("is rippling", "is wobbling", "is waving", "starts to ripple", "begins to wobble"),
    "waves": ("waves", "ripples", "small waves", "gentle ripples"),
    "water": ("water", "the water", "a lake", "a flag", "jelly", "the sea"),
    "night": ("night", "the night", "darkness", "the darkness", "dusk", "midnight"),
    "dark": ("dark", "night", "black", "darker", "darker and darker"),
    "comes": ("comes", "falls", "sets in", "arrives", "is falling", "spreads", "settles", "begins"),
    "becomes": ("becomes", "turns", "gets", "goes", "grows", "is becoming", "is turning"),
    "day": ("day", "light", "sky", "world"),
    "place": ("valley", "lake", "city", "town", "house", "sea", "land", "hills", "scene", "street", "forest"),
    "sun": ("the sun", "sun", "the evening sun", "the red sun"),
    "sets": ("sets", "goes down", "is setting", "sinks", "is going down"),
    "warm": ("warm", "golden", "orange", "red", "warmer", "gold"),
    "light": ("light", "evening light", "sunlight", "glow", "sunset"),
    "colour": ("colour", "colours", "color", "colors"),
    "fades": (
        *("fades", "fade", "fades away", "vanishes", "disappears", "drains", "drain", "drain out"),
        *("drains away", "goes", "is lost"),
    ),
    "grey": ("grey", "gray", "black and white", "monochrome", "colourless", "desaturated", "grayscale"),
    "fog": ("fog", "mist", "the fog", "the mist", "haze", "thick fog", "white mist", "a white haze"),
    "foggy": ("foggy", "misty", "hazy"),
    "comes in": (
        *("comes in", "rolls in", "rises", "drifts in", "spreads", "is rising"),
        *("moves in", "gets thicker"),
    ),
    "pans": ("pans", "moves", "drifts", "slides", "is panning", "is moving", "travels", "looks", "goes"),
    "tilts": ("tilts", "moves", "drifts", "is tilting", "is moving", "travels"),
    "zooms": ("zooms", "zooms", "is zooming", "dollies", "pushes", "moves", "goes"),
    "moving": ("moving", "moves", "movement", "motion"),
    "moves": ("moves", "is moving", "drifts", "travels"),
    "drifts": ("drifts", "moves", "slides", "travels"),
    "rotates": ("rotates", "spins", "rolls", "turns", "is rotating", "is turning"),
    "slowly": ("slowly", "gently", "smoothly", "gradually", "steadily"),
    "somebody": ("the girl", "the man", "a woman", "the dog", "the cat", "a robot", "a child", "the couple"),
    "does": (
        *("dances", "walks", "runs", "smiles", "laughs", "talks", "sings", "jumps", "eats"),
        *("reads", "plays"),
    ),
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
    *("{somebody} {does}", "{somebody} {does}", "{somebody} {does} and {does}", "{somebody} {slowly} {does}"),
)
SUBJECTS = (
    *("a cat", "a mountain lake", "a cup of coffee on a table", "a woman", "a city street", "a flower"),
    *("a house by the sea", "an old car", "a dog in a garden", "a rocket", "a green forest", "the sea"),
    *("a photo of a temple", "a portrait of a man", "a valley", "the desert", "a bridge", "the moon"),
    *("an astronaut", "a boat", "two children", "a room", "a kitten", "a beach", "a bird on a rock"),
)
STAND_IN = "cat"  # what the tokenizer makes of each word that is not in this grammar
LINKS = (
    *("the", "a", "his", "her", "and", "with", "on", "in the"),
    *("of", "from the", "over", "some", "two", "as", "for"),
)
FRAMES = (
    *("{}", "{}", "{}", "{}", "{}", "{}", "{}, cinematic", "{}, smooth motion"),
    *("{}, high quality", "slow {}"),
    *("{} slowly", "{} gently", "please {}", "{}, in one take", "a video in which {}", "now {}", "then {}"),
    *("smooth {}", "{}, realistic", "{} over the scene", "{} of the scene", "make it {}", "cinematic {}"),
)


def _words(text: str) -> str:
    """Give the words alone, each between spaces."""
    return f" {' '.join(re.findall(r'[a-z]+', text.lower()))} "


# Also without the sentence before the one that names the motion.
_MEASURED = {
    _words(text[first:])
    for texts in PARAPHRASES.values()
    for text in texts
    for first in (0, text.find(". ") + 1)
}


def _is_measured(text: str) -> bool:
    """Say whether a sentence is a paraphrase, or holds one of three words or more."""
    words = _words(text)
    return words in _MEASURED or any(each in words for each in _MEASURED if each.count(" ") > 3)


def draw(motion: str | None, by: random.Random) -> str:
    """Draw a sentence for a motion; for None one that names none of them. Paraphrases are never drawn."""
    while _is_measured(text := _draw(motion, by)):
        pass
    return text


def _strange(by: random.Random) -> str:
    """Draw what is left of a sentence of unknown words."""
    words: list[str] = []
    for _ in range(by.randint(2, 5)):
        words += [by.choice(LINKS), STAND_IN] if by.random() < 0.6 else [STAND_IN]
    return " ".join(words)


def _draw(motion: str | None, by: random.Random) -> str:
    phrase = by.choice(PHRASES[motion]) if motion else by.choice(OTHERS)
    if motion is None and by.random() < 0.6:
        phrase = _strange(by)
    while "{" in phrase:
        before, _, rest = phrase.partition("{")
        slot, _, after = rest.partition("}")
        phrase = before + by.choice(FILLERS[slot]) + after
    if motion or by.random() < 0.3:
        phrase = by.choice(FRAMES).format(phrase)
    if motion and by.random() < 0.15:  # it is to be heard among them, too
        words = phrase.split(" ")
        words.insert(by.randint(0, len(words)), STAND_IN)
        phrase = " ".join(words)
    kind = by.random()
    if motion and by.random() < 0.1:
        phrase = f"{_strange(by)}. {phrase}"
    elif kind < 0.25:
        phrase = f"{by.choice(SUBJECTS)}, {phrase}"
    elif kind < 0.4:
        subject = by.choice(SUBJECTS)
        phrase = f"{subject}. {phrase}"
    elif kind < 0.45:
        phrase = f"{phrase}, {by.choice(SUBJECTS)}"
    if by.random() < 0.4:
        phrase = phrase[0].upper() + phrase[1:]
    return phrase + by.choice(("", "", "", ".", ".", "!", " ."))
