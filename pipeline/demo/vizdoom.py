"""Frames of a Freedoom level with exact labels, rendered without a window by the `vizdoom` package.

The engine's label buffer gives every sprite its own value and tells walls (0) from horizontal planes (1). Doom has no
slopes and shears instead of tilting its view, so a plane pixel above the horizon row is ceiling and one below it is
floor. Sky carries the wall's value; it is found by swapping the sky's texture in a frozen world: what changes is sky.
So the six classes are exact, not guessed.
"""

import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.imaging import label_maps, perceptual_hash

WALL, FLOOR, CEILING, CREATURE, ITEM, WEAPON, IGNORE = 0, 1, 2, 3, 4, 5, 255
# Spectres are drawn as a faint shimmer and effects have no outline: nobody could label either by eye.
UNSEEN_NAMES = frozenset({"Spectre"})
UNSEEN_CATEGORIES = frozenset({"Explosive", "SFX"})
# Doom's pixels are 1.2 times as high as wide, so at 90 degrees of view the vertical focal length is 1.2 * width / 2.
PIXEL_ASPECT = 1.2
CLEARANCE = 28.0  # map units; the player's radius is 16
SKIES = ("SKY1", "SKY2", "SKY3")  # textures that both Freedoom games have
# The engine's buffer holds light before the display's gamma, which is how it looks on no screen.
DISPLAY = np.round(255 * (np.arange(256) / 255) ** (1 / 1.5)).astype(np.uint8)


class Frame(NamedTuple):
    image_png: bytes
    mask_png: bytes


class Job(NamedTuple):
    """Frames wanted of one level. `size` is width and height; the last three are `demo.Filters`."""

    level: str
    frames: int
    seed: int
    size: tuple[int, int]
    palette: tuple[tuple[int, int, int], ...]
    darkest: float
    largest_share: float
    near_bits: int


def crossings(start_2: NDArray[Any], end_2: NDArray[Any], line_N4: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of the map lines (x1, y1, x2, y2) the segment start-end meets."""
    a, b = line_N4[:, :2], line_N4[:, 2:]

    def side(p: NDArray[Any], q: NDArray[Any], r: NDArray[Any]) -> NDArray[Any]:
        (px, py), (qx, qy), (rx, ry) = (np.moveaxis(v, -1, 0) for v in (p, q, r))
        return np.asarray((qx - px) * (ry - py) - (qy - py) * (rx - px))

    ends_apart: NDArray[np.bool_] = side(start_2, end_2, a) * side(start_2, end_2, b) <= 0
    line_apart: NDArray[np.bool_] = side(a, b, start_2) * side(a, b, end_2) <= 0
    return ends_apart & line_apart


def line_distance(point_2: NDArray[Any], line_N4: NDArray[Any]) -> float:
    """Distance from a point to the nearest of the map lines."""
    a, b = line_N4[:, :2], line_N4[:, 2:]
    along = b - a
    share = ((point_2 - a) * along).sum(1) / np.maximum((along**2).sum(1), 1e-9)
    nearest = a + along * np.clip(share, 0, 1)[:, None]
    return float(np.hypot(*(point_2 - nearest).T).min())


class Level(NamedTuple):
    """What the poses are chosen from: solid map lines, the places of creatures and of all other things."""

    line_N4: NDArray[Any]
    creature_N2: NDArray[Any]
    item_N2: NDArray[Any]


def poses(rng: np.random.Generator, level: Level) -> Iterator[tuple[float, float, float, float]]:
    """Endless (x, y, yaw, pitch) in map units and degrees.

    A place is reached on a straight way from some thing of the map without meeting a solid line, so it is inside the
    level; half of the views turn towards a creature in sight, a quarter towards an item, all have free space ahead.
    """
    thing_N2 = np.concatenate([level.creature_N2, level.item_N2])
    while True:
        start = thing_N2[rng.integers(len(thing_N2))]
        way, reach, yaw = rng.uniform(0, 2 * np.pi), rng.uniform(48, 360), rng.uniform(0, 360)
        aim, turn, pitch = rng.random(), rng.uniform(-30, 30), float(np.clip(rng.normal(2, 7), -16, 16))
        place = np.round(start + reach * np.array([np.cos(way), np.sin(way)]))
        if crossings(start, place, level.line_N4).any() or line_distance(place, level.line_N4) < CLEARANCE:
            continue
        if np.hypot(*(thing_N2 - place).T).min() < 2 * CLEARANCE:
            continue
        if aim < 0.75:
            target_N2, far = (level.creature_N2, 700) if aim < 0.5 else (level.item_N2, 300)
            away_N = np.hypot(*(target_N2 - place).T)
            for index in np.argsort(away_N, kind="stable"):
                if away_N[index] < far and not crossings(place, target_N2[index], level.line_N4).any():
                    yaw = float(np.degrees(np.arctan2(*(target_N2[index] - place)[::-1])) + turn)
                    break
        ahead = place + 176 * np.array([np.cos(np.radians(yaw)), np.sin(np.radians(yaw))])
        if not crossings(place, ahead, level.line_N4).any():
            yield float(place[0]), float(place[1]), yaw % 360, pitch


def classes_of(
    labels_HW: NDArray[np.uint8], sky_HW: NDArray[np.bool_], sprites: list[tuple[int, str, str]], pitch: float
) -> NDArray[np.uint8]:
    """Engine labels -> the six classes.

    Args:
        labels_HW: the engine's buffer: 0 wall or sky, 1 horizontal plane, other values as `sprites` says.
        sky_HW: where the sky is seen.
        sprites: (value, object name, object category) of what is in view.
        pitch: degrees, positive looks down; the engine shears, so the horizon is one straight row.
    """
    height, width = labels_HW.shape
    horizon = height / 2 - PIXEL_ASPECT * width / 2 * np.tan(np.radians(pitch))
    below_H1 = (np.arange(height) + 0.5 > horizon)[:, None]
    out = np.where(labels_HW == 1, np.where(below_H1, FLOOR, CEILING), WALL).astype(np.uint8)
    out[sky_HW & (labels_HW == 0)] = CEILING
    for value, name, category in sprites:
        if name in UNSEEN_NAMES or category in UNSEEN_CATEGORIES:
            kind = IGNORE
        elif category == "Monster":
            kind = CREATURE
        else:
            kind = WEAPON if category == "Self" else ITEM
        out[labels_HW == value] = kind
    return out


def swapped(
    image_HWC: NDArray[np.uint8], seen: Sequence[NDArray[np.uint8]], back_HWC: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """Where the sky is, H x W: pixels that differ between the views `seen` under other skies and are as in `image_HWC`
    once its own sky is `back`. An animated wall differs as well, but does not come back."""
    same_HW: NDArray[np.bool_] = (back_HWC == image_HWC).all(2)
    sky_HW = np.zeros_like(same_HW)
    for one, two in combinations(seen, 2):
        sky_HW |= (one != two).any(2)
    return same_HW & sky_HW


def usable(image_HWC: NDArray[np.uint8], mask_HW: NDArray[np.uint8], darkest: float, largest_share: float) -> bool:
    """Whether a frame is bright enough and not nearly all of one class."""
    share_K = np.bincount(mask_HW.ravel(), minlength=256) / mask_HW.size
    return float(image_HWC.mean()) >= darkest and float(share_K.max()) <= largest_share


def _engine(job: Job) -> Any:
    import vizdoom as vd

    folder = Path(vd.__file__).parent
    game = vd.DoomGame()
    game.set_doom_config_path(str(Path.cwd() / f"{job.level}.ini"))
    game.set_doom_game_path(str(folder / ("freedoom2.wad" if job.level.startswith("map") else "freedoom1.wad")))
    game.set_doom_scenario_path("")
    game.set_doom_map(job.level)
    game.set_doom_skill(4)
    game.set_seed(zlib.crc32(f"{job.seed}/{job.level}".encode()) & 0x7FFFFFFF)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_mode(vd.Mode.PLAYER)
    game.set_episode_timeout(0)
    game.set_screen_resolution(getattr(vd.ScreenResolution, "RES_{}X{}".format(*job.size)))
    game.set_screen_format(vd.ScreenFormat.RGB24)
    for switch in ("labels_buffer", "depth_buffer", "objects_info", "sectors_info"):
        getattr(game, f"set_{switch}_enabled")(True)
    for what in ("hud", "crosshair", "messages", "screen_flashes", "particles", "decals", "effects_sprites"):
        getattr(game, f"set_render_{what}")(False)
    game.set_render_weapon(True)
    slots = [getattr(vd.Button, f"SELECT_WEAPON{slot}") for slot in range(1, 8)]
    game.set_available_buttons([vd.Button.TURN_LEFT_RIGHT_DELTA, vd.Button.LOOK_UP_DOWN_DELTA, *slots])
    variables = ("POSITION_X", "POSITION_Y", "POSITION_Z", "ANGLE", "PITCH")
    game.set_available_game_variables([getattr(vd.GameVariable, name) for name in variables])
    game.init()
    return game


def _survey(state: Any) -> Level:
    lines = {(s.x1, s.y1, s.x2, s.y2) for sector in state.sectors for s in sector.lines if s.is_blocking}
    things = [o for o in state.objects if o.name != "DoomPlayer"]

    def places(creature: bool) -> NDArray[Any]:
        at = [(o.position_x, o.position_y) for o in things if (o.category == "Monster") == creature]
        return np.array(at, dtype=np.float64).reshape(-1, 2)

    return Level(np.array(sorted(lines), dtype=np.float64).reshape(-1, 4), places(True), places(False))


def _act(game: Any, turn: float = 0.0, look: float = 0.0, slot: int | None = None, tics: int = 1) -> None:
    game.make_action([turn, look, *(float(s == slot) for s in range(1, 8))], tics)


def _face(game: Any, x: float, y: float, yaw: float, pitch: float) -> bool:
    """Warp the player and turn the view; False when the engine did not put it there."""
    game.send_game_command(f"warp {x:.0f} {y:.0f}")
    _act(game, tics=8)  # the view settles on the new floor's height
    for _ in range(6):
        at = [game.get_game_variable(variable) for variable in game.get_available_game_variables()]
        turn, look = (float(at[3]) - yaw + 180) % 360 - 180, float(at[4]) - pitch
        if abs(turn) < 0.1 and abs(look) < 0.1:
            return bool(np.hypot(at[0] - x, at[1] - y) < CLEARANCE and at[2] > -30000)
        _act(game, turn, float(np.clip(look, -20, 20)))
    return False


def _natural_sky(level: str) -> str:
    """Sky texture of a level, as the original games assign them: by episode, or by range of map numbers."""
    if not level.startswith("map"):
        return f"SKY{level[1]}"
    number = int(level[3:])
    return SKIES[(number > 11) + (number > 20)]


def _shoot(game: Any, level: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
    """The view as (image_HWC, mask_HW) with the world frozen meanwhile; None when it did not stand still."""
    game.send_game_command("freeze")
    _act(game, tics=2)
    state = game.get_state()
    image_HWC = state.screen_buffer.copy()
    labels_HW, sprites = state.labels_buffer.copy(), [(s.value, s.object_name, s.object_category) for s in state.labels]
    far_HW = state.depth_buffer == int(255 * labels_HW.shape[0] / 480)  # the depth of sky: the scale's end
    pitch, seen = float(state.game_variables[4]), []
    for sky in (*SKIES, _natural_sky(level)):
        game.send_game_command(f"changesky {sky}")
        _act(game)
        seen.append(game.get_state().screen_buffer.copy())
    game.send_game_command("freeze")
    back_HWC = seen.pop()
    if (back_HWC == image_HWC).all(2).mean() < 0.9:
        return None
    return DISPLAY[image_HWC], classes_of(labels_HW, far_HW & swapped(image_HWC, seen, back_HWC), sprites, pitch)


def render(job: Job) -> tuple[str, list[Frame]]:
    """Frames of one level, the same on every run: (level, frames as PNG with their masks as index PNG)."""
    rng = np.random.default_rng([job.seed, zlib.crc32(job.level.encode())])
    game = _engine(job)
    try:
        for command in ("god", "give weapons", "give ammo", "cl_showsecretmessage 0"):
            game.send_game_command(command)
        _act(game, tics=20)  # the engine ignores turns during a level's first tics
        near = perceptual_hash.NearIndex(job.near_bits)
        frames: list[Frame] = []
        for tried, pose in enumerate(poses(rng, _survey(game.get_state()))):
            if len(frames) == job.frames:
                return job.level, frames
            if tried == 40 * job.frames:
                raise RuntimeError(f"level {job.level}: {len(frames)} of {job.frames} usable frames in {tried} tries")
            if tried % 5 == 0:
                _act(game, slot=int(rng.integers(1, 8)))
                _act(game, tics=40)  # lowering one weapon and raising the next
            shot = _shoot(game, job.level) if _face(game, *pose) else None
            if shot is None or not usable(*shot, job.darkest, job.largest_share):
                continue
            image_HWC, mask_HW = shot
            print_64 = perceptual_hash.dhash(image_HWC)
            if near.find(print_64) is None:
                near.add(print_64, job.level)
                frames.append(Frame(_png(image_HWC), label_maps.encode_png(mask_HW, job.palette)))
        raise AssertionError("poses() is endless")
    finally:
        game.close()


def _png(image_HWC: NDArray[np.uint8]) -> bytes:
    out = BytesIO()
    Image.fromarray(image_HWC).save(out, "PNG", compress_level=4)
    return out.getvalue()
