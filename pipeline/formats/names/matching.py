"""Which image a label's, mask's or list's name means: exactly first, then by rules that forgive what tools do to names.

Each rule forgives one more thing than the one before. A name is looked up by the first rule under which any image answers;
where several answer, nobody can tell which is meant, and it is refused by name. Of several names that mean one image, those
by the strictest rule have it; if those are several, none has it.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

EXACT, SAME_NAME = "exact", "same name"  # neither forgives anything
ABOVE = "folders above images/"
SHOWN = 4  # names in a reason
_RECENT = 64  # the rules reduce one name in turn, each from what the one before made of it

# What tools and people append to a mask's name, and put in front of an uploaded file's (Label Studio: 8 hex digits). A suffix
# comes off the name alone: an image `x_l.png` is the left one of two. A prefix may be on either side, but not on both: those
# of `20260401-noon` and `20260402-noon` are dates.
_MASK_WORDS = (
    "mask", "masks", "label", "labels", "labelids", "labeltrainids", "gt", "seg", "segm", "segmentation", "semantic",
    "annotation", "annotations", "target", "l",
)  # fmt: skip
_ONLY_MASKS = frozenset(
    {"mask", "masks", "labelids", "labeltrainids", "seg", "segm", "segmentation"}
)  # never a photo's name
_LOSSLESS = re.compile(r"\.(png|bmp|tiff?|gif)$", re.IGNORECASE)
_SUFFIX = re.compile(rf"[ ._-]({'|'.join(_MASK_WORDS)})$")
_IMAGE_SUFFIX = re.compile(r"[ ._-](image|img|im|photo|rgb|sat)$")  # beside x_mask.png
_PREFIX = re.compile(r"^[0-9a-f]{8}-(?=.)")
_EXTENSIONS = frozenset(
    {
        "png", "jpg", "jpeg", "jfif", "jpe", "webp", "bmp", "dib", "tif", "tiff", "gif", "jp2", "heic", "heif", "avif",
        "json", "xml",
    }
)  # fmt: skip
_ABOVE = re.compile(r"^(.*/)?images/")
_LAYOUT = re.compile(r"^(images|masks|jpegimages|segmentationclass|labels|annotations)/")


class Match(NamedTuple):
    """`image`: the image that is meant, None where `candidates` are several or none. `rule`: what had to be forgiven."""

    image: str | None
    rule: str
    candidates: Sequence[str] = ()


def _same_name(name: str) -> str:
    stem, dot, extension = name.rpartition(".")
    return stem if dot and extension.casefold() in _EXTENSIONS else name


def _slashes(name: str) -> str:
    path = name.replace("\\", "/")
    if "//" in path:
        path = re.sub(r"/+", "/", path)
    return path.removeprefix("./").lstrip("/")


def _form(name: str) -> str:
    return _normal(_slashes(name))


def _normal(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


@lru_cache(_RECENT)
def _case(name: str) -> str:
    return _normal(_form(name).casefold())


@lru_cache(_RECENT)
def _extension(name: str) -> str:
    """Without any image extension, however many: `x.jpg.png` and `x` are one name."""
    path = _case(name)
    if found := _LAYOUT.match(path):
        path = path[found.end() :]
    return _without_extensions(path)


def _without_extensions(path: str) -> str:
    while (shorter := _same_name(path)) != path and shorter and not shorter.endswith("/"):
        path = shorter
    return path


@lru_cache(_RECENT)
def _suffix(name: str) -> str:
    path = _extension(name)
    found = _SUFFIX.search(path)
    shorter = _without_extensions(path[: found.start()]) if found else path
    return shorter if shorter and not shorter.endswith("/") else path


def _without_prefix(path: str) -> str:
    folder, slash, file = path.rpartition("/")
    return f"{folder}{slash}{_PREFIX.sub('', file)}"


def _prefix(name: str) -> str:
    return _without_prefix(_suffix(name))


def _tool_prefix(path: str) -> str:
    """The prefix of a path's last part; "" where it has none."""
    return _prefix_of(_extension(path))


def _prefix_of(plain: str) -> str:
    found = _PREFIX.match(plain.rpartition("/")[2])
    return found[0] if found else ""


def _name_below(name: str) -> str:
    return _ABOVE.sub("", _prefix(name))


# Of an image that `_extension` has reduced already: 100,000 of them are reduced once, not once for each rule.


def _image_suffix(plain: str) -> str:
    found = _IMAGE_SUFFIX.search(plain)
    shorter = plain[: found.start()] if found else plain
    return shorter if shorter and not shorter.endswith("/") else plain


def _last_part(plain: str) -> str:
    return _without_prefix(plain).rpartition("/")[2]


def _image_below(plain: str) -> str:
    return _ABOVE.sub("", _without_prefix(plain))


Reduce = Callable[[str], str]
Key = TypeVar("Key")


class Rule(NamedTuple):
    """What a name and an image's path are reduced to; equal results answer. `plain`: that of what `_extension` leaves of it."""

    of_name: Reduce
    of_image: Reduce
    plain: bool = False


# What each rule calls itself in a report, strictest first.
RULES: dict[str, Rule] = {
    EXACT: Rule(str, str),
    SAME_NAME: Rule(_same_name, _same_name),
    "slashes": Rule(_slashes, _slashes),
    "Unicode form": Rule(_form, _form),
    "upper and lower case": Rule(_case, _case),
    "extension": Rule(_extension, str, plain=True),
    "suffix such as _mask": Rule(_suffix, str, plain=True),
    "suffix such as _image": Rule(_suffix, _image_suffix, plain=True),
    "prefix of a tool": Rule(_prefix, str, plain=True),
    "prefix of a tool, on the image": Rule(_suffix, _without_prefix, plain=True),
    ABOVE: Rule(_name_below, _image_below, plain=True),
}
LAST = "folders"  # the last rule: one is the end of the other, and no other image has that last part
ORDER = (*RULES, LAST)


class Index:
    """The images of a source, ready to be asked which one a name means."""

    def __init__(self, images: Iterable[str]) -> None:
        """`images`: every image's path with its extension, below the source or its images folder."""
        self.images = list(images)
        self._plain: list[str] = []  # of each image, made when a name is not found by a stricter rule
        self._tables: dict[tuple[Reduce, bool], Mapping[str, Sequence[str]]] = {}
        self._by_prefix: dict[Reduce, Mapping[tuple[str, str], Sequence[str]]] = {}

    def find(self, name: str, *, folders: bool = True) -> Match:
        """The image that `name` means: a path with or without folders and extension, as a tool wrote it.

        Args:
            folders: also where only the end of a path is that of one image (the rule `LAST`). False where images that the
                name could mean as well may be missing here.
        """
        for rule, reduce in RULES.items():
            key = reduce.of_name(name)
            if answers := self._possible(name, key, reduce.of_image) if rule == ABOVE else self._of(key, reduce):
                return _one(answers, rule)
        if not folders:
            return Match(None, LAST)
        wanted = _prefix(name)
        answers = self._possible(name, wanted.rpartition("/")[2], _last_part)
        if len(answers) != 1:
            return Match(None, LAST, answers)
        # cam2/001.png is not cam1/001.png, although no other image has that last part
        image = _without_prefix(_extension(answers[0]))
        same = f"/{wanted}".endswith(f"/{image}") or f"/{image}".endswith(f"/{wanted}")
        return Match(answers[0], LAST) if same else Match(None, LAST)

    def _of(self, key: str, rule: Rule) -> Sequence[str]:
        """The images that the rule reduces to `key`."""
        table = (rule.of_image, rule.plain)
        if table not in self._tables:
            paths = self._plain_paths() if rule.plain else self.images
            self._tables[table] = _grouped(zip(map(rule.of_image, paths), self.images, strict=True))
        return self._tables[table].get(key, ())

    def _plain_paths(self) -> Sequence[str]:
        if not self._plain:
            self._plain = [_extension(image) for image in self.images]
        return self._plain

    def _possible(self, name: str, key: str, reduce: Reduce) -> Sequence[str]:
        """The images that reduce to `key`, without those of another tool's prefix than the name's own.

        They are looked up by prefix: of 100,000 images called `image.png` none is gone through for each name.
        """
        own = _tool_prefix(name)
        if not own:
            return self._of(key, Rule(str, reduce, plain=True))
        if reduce not in self._by_prefix:
            both = zip(self._plain_paths(), self.images, strict=True)
            self._by_prefix[reduce] = _grouped(((reduce(plain), _prefix_of(plain)), image) for plain, image in both)
        with_own, without = (self._by_prefix[reduce].get((key, prefix), ()) for prefix in (own, ""))
        return [*with_own, *without] if with_own else without


def _grouped(pairs: Iterable[tuple[Key, str]]) -> dict[Key, list[str]]:
    found: dict[Key, list[str]] = defaultdict(list)
    for key, image in pairs:
        found[key].append(image)
    return dict(found)


def _one(answers: Sequence[str], rule: str) -> Match:
    return Match(answers[0], rule) if len(answers) == 1 else Match(None, rule, answers)


class Matched(NamedTuple):
    """`images`: name -> image. `refused`: name -> reason. `forgiven`: (what, first name -> image) lines for the table."""

    images: dict[str, str]
    refused: dict[str, str]
    forgiven: list[tuple[str, str]]


def match(names: Sequence[str], images: Iterable[str]) -> Matched:
    """Pair names with images, each image at most once.

    Args:
        names: as labels, masks or lists state them; equal names count once.
        images: every image's path with its extension.
    """
    index = Index(images)
    found = {name: index.find(name) for name in dict.fromkeys(names)}
    claims: dict[str, list[str]] = defaultdict(list)
    for name, match_ in found.items():
        if match_.image is not None:
            claims[match_.image].append(name)

    paired: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, match_ in found.items():
        if match_.image is None:
            refused[name] = _unclear(match_.candidates)
            continue
        others = claims[match_.image]
        best = min(ORDER.index(found[other].rule) for other in others)
        owners = [other for other in others if ORDER.index(found[other].rule) == best]
        if owners == [name]:
            paired[name] = match_.image
        elif name in owners:
            refused[name] = f"{match_.image} could be each of {listed(others)}; keep one, or rename them"
        else:
            refused[name] = f"{match_.image} is meant by {listed(owners)} already; keep one, or rename this one"

    count = Counter(found[name].rule for name in paired)
    firsts = {found[name].rule: f"{name} is {image}" for name, image in reversed(paired.items())}
    forgiven = [(rule, f"{count[rule]}, the first: {firsts[rule]}") for rule in ORDER[2:] if count[rule]]
    return Matched(paired, refused, forgiven)


def _unclear(candidates: Sequence[str]) -> str:
    if not candidates:
        return "no image has this name"
    return f"{listed(candidates)} could be meant; state the folder and the extension"


def listed(names: Sequence[str]) -> str:
    """`a, b, c, d and 3 more`."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def is_mask_word(word: str) -> bool:
    """Whether a word only says that a file is a mask, as in `x_mask.png`, and names no class."""
    return word.casefold() in _MASK_WORDS


def masks_beside(names: Sequence[str], labelled: Collection[str] = ()) -> list[str]:
    """Which of the images of a folder are masks of others by their names: `x_mask.png` beside `x.jpg`.

    Words that a photograph's name may end in as well, such as `label`, count for formats that masks are saved in.

    Args:
        labelled: names without extension that have a mask themselves, so that they are images.
    """
    stems = {_same_name(name).casefold() for name in names}
    return [name for name in names if _same_name(name) not in labelled and _image_of_mask(name) in stems]


def _image_of_mask(name: str) -> str | None:
    """What a mask's name says its image is called, in lower case: `cam0/x_mask.png` -> `cam0/x`; None for other names."""
    stem = _same_name(name).casefold()
    found = _SUFFIX.search(stem)
    if found is None or (found[1] not in _ONLY_MASKS and not _LOSSLESS.search(name)):
        return None
    image = stem[: found.start()]
    return image if image and not image.endswith("/") else None
