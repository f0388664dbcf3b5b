"""Questions about a scene with their answers, and the tokenizer of the pre-trained tiny VLM.

Answers are one to three words, or the names of the largest parts. Places are words too: x7 y3 is a
square of 4 pixels, d2 a distance, left2 a way from the fingers' tip. A question names a part only if
no other part has its colour and noun.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tools.pretraining.dense import part_views
from tools.pretraining.scenes import COLOUR, NOUN, OPEN, PLACE, SIZE, THING, VIEWS
from tools.pretraining.things import COLOUR_WORDS, NOUNS

GRID = 4  # px of a place word
BINS = SIZE // GRID
DISTANCES = 8
STEP = 0.05  # m, of the way's first word
WAYS = (("left", "right"), ("down", "up"), ("away", "near"))
COUNT_WORDS = "zero one two three four five six seven eight nine ten many"
COUNTS = COUNT_WORDS.split()
SYNONYMS = {
    "box": ("block", "cube"),
    "can": ("cylinder",),
    "ball": ("sphere",),
    "stick": ("bar", "rod"),
    "dot": ("point",),
    "grey": ("gray",),
    "cabinet": ("cupboard",),
    "gripper": ("hand",),
}
GO = ("go to the", "reach for the", "point at the", "find the", "move to the", "touch the")
# A generic list, so that most instructions take a token a word. All other words take several.
WORDS = """
a an the this that it its one some any all both each other another and or not no yes if then than
so too very more less most at by for from in into of off on onto out over to toward towards under
up upon with without within inside outside near next above across after again against ahead along
among apart around aside away back backward backwards before behind below beneath between beyond
bottom center centre close closed closer corner down downward downwards edge end far first forward
forwards front half here high horizontal last left level low lower middle open opened opposite
outward right second side sideways slightly straight there third through top turned upper upright
upside vertical be is are was were been has have do does done can will would should must let add
align angle approach assemble attach balance bend block bring build carry catch change check
choose clean clear climb come connect control cook cover crush cut detach dip disconnect drag draw
drive drop empty engage enter extend face fetch fill find fit flip fold follow gather get go grab
grasp grip hammer hang hit hold hook insert join keep kick knock lay lead leave lift lock look
loosen make mix move nudge pack pick pinch place plug point poke position pour press pull push put
raise reach release remove replace reset rest retract return roll rotate scoop screw scrub seal
seat separate set shake shift shut slide spin spread squeeze stack stand start stay stir stop
store strike sweep swing switch take tap throw tie tighten tilt toggle touch turn twist uncover
undo unfold unhook unlock unplug unscrew unstack use wait wash wave wipe wrap apple arm bag ball
banana bar barrel base basin basket bead bean bear bell bench bin bird board boat bolt book bottle
bow bowl box bracket bread brick bridge broom brush bucket bulb burner button cabinet cable cage
cake candle cap car card carrot carton cart case chain chair chalk chip circle clamp clip clock
cloth coffee coin cone container cooker cookie cord cork corn counter crate cross cube cucumber
cup cupboard curtain cushion cylinder desk dial dice dish disc disk door dot drawer drill duck egg
eggplant eraser fan faucet finger fish fixture flag floor flower foot fork frame fridge fruit fuse
garlic gate gear glass glove glue goal grape gripper guide hand handle hat head heart hinge hob
holder hole hoop hose house jar joint jug kettle key keyboard kitchen knife knob ladder ladle lamp
laptop latch leg lemon letter lever lid light line link log loop machine magnet mango marker mat
match meat meter microwave milk mirror mouse mug mushroom nail neck needle net nose nut object
onion orange oven page paddle paint pan panel paper part peach pear peg pen pencil pepper phone
piece pillar pin pipe plant plate pliers plum pocket pole post pot potato pump rack radio rag rail
ramp razor ring robot rod roller roof room rope rug ruler salt saucer sauce saw scale scissors
screen screwdriver shaft sheet shelf shell shirt shoe shovel sink slot soap sock socket sofa
spatula spice sponge spoon spot spring square star stick stone stove strawberry string stool
surface table tack tape target tea thing tile tin toast toaster tomato tong tool tooth tower towel
toy track train trash tray triangle tube valve vase vegetable vent wall washer water wedge wheel
window wire wood wrench zip zone big bright broken cold colored coloured dark dirty double dry
flat full gentle hard heavy hot hidden large little long loose narrow new old plain round same
sharp short single slow small smooth soft solid strong tall thick thin tight tiny warm wet whole
wide wooden metal plastic rubber steel amount color colour count degree direction distance height
length number shape size speed step time way weight what where which who why how many much blue
red green yellow purple pink brown white black grey gray cyan beige gold silver violet magenta
turquoise zero two three four five six seven eight nine ten
"""
SUFFIXES = "s es ed er ing ly y ish est ion al le en th er or ar an in on st ch ck sh tr"


def vocabulary() -> list[str]:
    """Return every token, in the order of its number."""
    tokens = ["<pad>", "<unk>", "<image>"]
    tokens += [f"{axis}{i}" for axis in "xy" for i in range(BINS)]
    tokens += [f"d{i}" for i in range(DISTANCES)]
    tokens += [f"{word}{i}" for pair in WAYS for word in pair for i in (1, 2, 3)] + ["same"]
    tokens += [*NOUNS, *COLOUR_WORDS, *COUNTS, "half", "yes", "no"]
    tokens += [word for words in SYNONYMS.values() for word in words]
    tokens += WORDS.split()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(i) for i in range(10)]
    tokens += letters + [chr(c) for c in range(33, 127) if not chr(c).isalnum()]
    tokens += [f"##{piece}" for piece in [*letters, *SUFFIXES.split()]]
    return list(dict.fromkeys(tokens))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words. It spells other words."""
    numbers = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def save_tokenizer(folder: str | Path) -> None:
    """Write the tokenizer's files."""
    build_tokenizer().save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Questions


@dataclass
class Question:
    """A question about scene number `scene` of a batch."""

    scene: int
    kind: str
    text: str
    answer: str
    part: int = -1  # row of the scene's table that it asks about


def distance_word(depth: float) -> str:
    """Return the word of a logarithmic depth relative to the camera's distance."""
    return f"d{int(np.clip((depth + 1) * 4, 0, DISTANCES - 1))}"


def way_words(place: np.ndarray) -> str:
    """Return the words of a way (3,) in metres: right, up, towards the camera."""
    words = []
    for value, pair in zip(place, WAYS):
        size = int(np.digitize(abs(value), [0.3 * STEP, STEP, 2 * STEP]))
        words.append(f"{pair[int(value > 0)]}{size}" if size else "same")
    return " ".join(words)


def place_words(where: np.ndarray) -> str:
    """Return the words of a row and column (2,) in px."""
    row, column = np.clip(where // GRID, 0, BINS - 1).astype(int)
    return f"x{column} y{row}"


class Asker:
    """Asks about the scenes of a batch. min_cells: cells of 2 x 2 px that a part must show."""

    def __init__(self, batch: dict, rng: np.random.Generator, min_cells: int = 2):
        self.rng = rng
        self.tables = batch["tables"].astype(np.float32)
        self.where, self.cells, self.named = part_views(batch)
        self.cells = np.nan_to_num(self.cells)
        self.gripper = batch["gripper"].astype(np.float32)
        self.min_cells = min_cells

    def name(self, noun: int, colour: int) -> str:
        """Return a part's colour and noun, at times by other words."""
        words = []
        for word in (COLOUR_WORDS[colour], NOUNS[noun]):
            others = SYNONYMS.get(word)
            words.append(self.rng.choice([word, word, *others]) if others else word)
        return " ".join(words)

    def ask(self, b: int, kind: str | None = None) -> Question | None:
        """Return a random question about scene b, or None if it cannot be asked there."""
        rng = self.rng
        t = self.tables[b]
        two = self.gripper[b, 5] > 1
        cells = self.cells[b]  # (2, PARTS)
        shown = (cells >= self.min_cells).any(0) & self.named[b] & (t[:, COLOUR] >= 0)
        rows = np.flatnonzero(shown)
        kind = kind or str(rng.choice(KINDS, p=KIND_WEIGHTS))
        if kind == "tip":
            v = int(rng.integers(2)) if two else 0
            tip = self.gripper[b, 2 * v : 2 * v + 2]
            if np.isnan(tip[0]):
                return None
            return Question(b, kind, f"where is the gripper{self.view(two, v)}", place_words(tip))
        if kind == "grip":
            if self.gripper[b, 4] < 0:
                return None
            opened = self.gripper[b, 4] > 0.02
            return Question(b, kind, "is the gripper open", "yes" if opened else "no")
        if not len(rows):
            return None
        if kind == "count":
            n = len(np.unique(t[rows, THING]))
            return Question(b, kind, "how many things", COUNTS[min(n, 11)])
        if kind == "caption":
            largest = rows[np.argsort(-cells[:, rows].max(0))][:3]
            names = [f"{COLOUR_WORDS[int(t[i, COLOUR])]} {NOUNS[int(t[i, NOUN])]}" for i in largest]
            return Question(b, kind, "what is there", " ".join(names))
        part = int(rng.choice(rows))
        noun, colour = t[part, [NOUN, COLOUR]].astype(int)
        # Also a part that hardly shows makes a name ambiguous.
        seen = cells.any(0)
        same_noun = seen & (t[:, NOUN] == noun)
        same_colour = seen & (t[:, COLOUR] == colour) & self.named[b]
        name = self.name(noun, colour)
        views = np.flatnonzero(
            (cells[:, part] >= self.min_cells) & ~np.isnan(self.where[b, :, part, 0])
        )
        v = int(rng.choice(views)) if len(views) else -1
        view = self.view(two, v)
        if kind == "colour":
            if len(np.unique(t[same_noun, COLOUR])) > 1:
                return None
            text = f"color of the {name.split()[1]}"
            return Question(b, kind, text, COLOUR_WORDS[colour], part)
        if kind == "noun":
            if len(np.unique(t[same_colour, NOUN])) > 1:
                return None
            return Question(b, kind, f"what is {COLOUR_WORDS[colour]}", NOUNS[noun], part)
        if kind == "at":
            if v < 0:
                return None
            text = f"what is at {place_words(self.where[b, v, part])}"
            return Question(b, kind, text, f"{COLOUR_WORDS[colour]} {NOUNS[noun]}", part)
        if (same_noun & same_colour).sum() != 1:
            return None
        if kind == "open":
            if t[part, OPEN] < 0:
                return None
            answer = ["no", "half", "yes"][int(np.digitize(t[part, OPEN], [0.15, 0.7]))]
            return Question(b, kind, f"is the {name} open", answer, part)
        if kind == "way":
            if self.gripper[b, 4] < 0:
                return None
            text = f"gripper to the {name}"
            return Question(b, kind, text, way_words(t[part, PLACE : PLACE + 3]), part)
        if v < 0:
            return None
        if kind == "go":
            text = f"{rng.choice(GO)} {name}"
            return Question(b, kind, text, place_words(self.where[b, v, part]), part)
        if kind == "where":
            text = f"where is the {name}{view}"
            return Question(b, kind, text, place_words(self.where[b, v, part]), part)
        if kind == "far":
            depth = t[part, VIEWS + 4 * v + 2]
            return Question(b, kind, f"how far is the {name}{view}", distance_word(depth), part)
        assert kind == "side", kind
        others = [i for i in rows if i != part and (cells[v, i] >= self.min_cells)]
        if not others:
            return None
        other = int(rng.choice(others))
        across = self.where[b, v, [part, other], 1]
        if not abs(across[0] - across[1]) > 4:
            return None
        other_name = self.name(*t[other, [NOUN, COLOUR]].astype(int))
        text = f"is the {name} left of the {other_name}{view}"
        return Question(b, kind, text, "yes" if across[0] < across[1] else "no", part)

    def view(self, two: bool, v: int) -> str:
        """Return the words for a view of two."""
        return ["", " above", " below"][int(two) * (v + 1)]

    def questions(self, per_scene: int) -> list[Question]:
        """Return up to `per_scene` questions about each scene of the batch."""
        found = []
        for b in range(len(self.tables)):
            asked = (self.ask(b) for _ in range(2 * per_scene))
            found += [question for question in asked if question][:per_scene]
        return found

    def target(self, question: Question) -> np.ndarray:
        """Return the part's way from the tip (3) in 0.15 m and its places in both views (4) in SIZE / 2 px.

        NaN where they are unknown.
        """
        if question.part < 0 or question.kind in ("noun", "colour"):
            return np.full(7, np.nan, np.float32)
        b, part = question.scene, question.part
        way = self.tables[b, part, PLACE : PLACE + 3] / 0.15
        if self.gripper[b, 4] < 0:
            way = way * np.nan
        hidden = self.cells[b, :, part] < 1
        where = np.where(hidden[:, None], np.nan, self.where[b, :, part]) / (SIZE / 2) - 1
        return np.concatenate([way, where.ravel()]).astype(np.float32)


WEIGHTS = {
    "colour": 2,
    "noun": 1.5,
    "at": 2,
    "where": 2.5,
    "go": 2.5,
    "way": 2.5,
    "far": 1,
    "side": 1,
    "open": 2,
    "tip": 1.5,
    "grip": 0.7,
    "count": 0.5,
    "caption": 1,
}
KINDS = list(WEIGHTS)
KIND_WEIGHTS = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
