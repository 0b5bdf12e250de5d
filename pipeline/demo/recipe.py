"""The embedded demo data: synthetic frames of Freedoom levels with exact labels, as demo.yaml says."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.demo import vizdoom


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    frames: int = Field(gt=0)
    levels: tuple[str, ...]


class Class(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    color: tuple[int, int, int]


class Filters(BaseModel):
    """A frame is dropped when its mean grey is below `darkest`, when one class fills more than `largest_share` of
    it, or when its difference hash is within `near_bits` of a kept frame of the same level."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    darkest: float
    largest_share: float
    near_bits: int


class Recipe(BaseModel):
    """demo.yaml. `size` is one of the engine's native resolutions, width and height."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seed: int
    size: tuple[int, int]
    classes: tuple[Class, Class, Class, Class, Class, Class]
    filters: Filters
    labelled: Part
    unlabelled: Part
    val: Part
    test: Part
    dumps: dict[str, Part] = {}


def load_recipe(path: Path) -> Recipe:
    """Read and check demo.yaml. Raises ValueError that names the file and the field."""
    try:
        recipe = Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: not found; params.yaml's data.path must name the demo's recipe") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    owner: dict[str, str] = {}
    named = {"train": recipe.unlabelled, "val": recipe.val, "test": recipe.test, **recipe.dumps}
    for part, levels in ((name, item.levels) for name, item in named.items()):
        for level in levels:
            if owner.setdefault(level, part) != part:
                raise ValueError(f"{path}: level {level!r} is in {owner[level]} and in {part}; a level serves one part")
    if strays := sorted(set(recipe.labelled.levels) & (set(owner) - set(recipe.unlabelled.levels))):
        raise ValueError(f"{path}: labelled levels {strays} also serve val, test or a dump")
    return recipe


def counts(recipe: Recipe) -> dict[str, int]:
    """Frames to render for each level."""
    wanted: dict[str, int] = {}
    for part in (recipe.labelled, recipe.unlabelled, recipe.val, recipe.test, *recipe.dumps.values()):
        for level in part.levels:
            wanted[level] = wanted.get(level, 0) + part.frames
    return wanted


def jobs(recipe: Recipe) -> list[vizdoom.Job]:
    """One rendering job per level, the longest first."""
    palette = tuple(c.color for c in recipe.classes)
    rules = (recipe.seed, recipe.size, palette, *recipe.filters.model_dump().values())
    return sorted((vizdoom.Job(level, n, *rules) for level, n in counts(recipe).items()), key=lambda job: -job.frames)


def _enter_own_folder(parent: str) -> None:
    """Work in a new folder below `parent`.

    The engine makes `./_vizdoom` without asking whether another engine just did, and ends its process where one did:
    engines that start together need a folder each.
    """
    os.chdir(tempfile.mkdtemp(dir=parent))


def render_all(
    recipe: Recipe, workers: int, done: Callable[[str, int], None] = lambda level, frames: None
) -> dict[str, list[vizdoom.Frame]]:
    """Render every level of the recipe in `workers` processes; `done(level, frames)` is called as levels finish.

    Each level has an engine and a random stream of its own, so neither the order nor the number of workers matters.
    """
    found: dict[str, list[vizdoom.Frame]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="demo-") as folder,
        ProcessPoolExecutor(workers, get_context("spawn"), initializer=_enter_own_folder, initargs=(folder,)) as pool,
    ):
        try:
            for level, frames in pool.map(vizdoom.render, jobs(recipe)):
                found[level] = frames
                done(level, len(frames))
        except BrokenProcessPool as error:
            raise RuntimeError(
                "rendering the demo's images: the level engine ended unexpectedly, perhaps out of memory; run pull again"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found
