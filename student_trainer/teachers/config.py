"""Teacher of a run: a store, a service, a live model, none."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro

from feature_store.errors import InputError
from feature_store.tools.options import JsonObject, check_fields, plain_defaults, require
from feature_store.views import PolicyName

SCHEMES = ("http://", "https://")
_LIVE = "live+"


@dataclass(frozen=True)
@plain_defaults
class ViewsConfig:
    """Views of a run without a store; with one, its own are replayed.

    Attributes:
        policy: View policy (rrc_flip: schedules T1 and T2; a1, a2 and a3: A1, A2 and A3).
        size: Height and width of a view, in pixels.
        seed: Seed of the views.
        count: Views per sample, used in turn; default a new one every epoch.
    """

    policy: PolicyName = "rrc_flip"
    size: int = 224
    seed: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        check_fields(self, "views.")
        require(self.size >= 1, "--views.size", self.size, "at least 1")
        require(0 <= self.seed < 2**64, "--views.seed", self.seed, "an unsigned 64-bit integer")
        require(self.count is None or self.count >= 1, "--views.count", self.count, "at least 1")


@dataclass(frozen=True)
class Replay:
    """Use of a store's views.

    Attributes:
        num_views: Use the store's first views only; default all. Epoch e uses view e mod this.
        check_all_pixels: Check the CRC of every view; False: of each unit's first 8 only, which saves 1 to 2 % of the
            time that workers take to make views.
    """

    num_views: int | None = None
    check_all_pixels: bool = True

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        check_fields(self)
        require(self.num_views is None or self.num_views >= 1, "--num-views", self.num_views, "at least 1")


@dataclass(frozen=True)
class StoreTeacher:
    """Features cached in a store; a tuple of these is several teachers at once.

    Attributes:
        store: A directory, or a URL (s3://, gs://, http(s)://).
        weight: With several teachers: factor on this one's terms, and its share of the mean of their probabilities.
        replay: Use of the store's views; of several stores the first one's counts.
    """

    store: str | Path
    weight: float = 1.0
    replay: Replay = Replay()

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        check_fields(self)
        require(self.weight > 0, "--store-weights", self.weight, "above 0")


@dataclass(frozen=True)
class ServiceTeacher:
    """Features over HTTP, of the store that the service holds.

    Attributes:
        url: http(s)://host:port.
        live: Have the service's live teacher compute them, instead of reading cached rows.
        token_file: File with the bearer token; default the environment variable FEATURE_STORE_TOKEN.
        replay: Use of the store's views.
    """

    url: str
    live: bool = False
    token_file: Path | None = None
    replay: Replay = Replay()

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        check_fields(self)
        if not self.url.startswith(SCHEMES):
            raise InputError(f"the service's URL is {self.url!r}, expected http(s)://host:port")


@dataclass(frozen=True)
@plain_defaults
class LiveOptions:
    """The live teacher; only for ``--source live``.

    Attributes:
        name: timm model name, or package.module:build, your own function that returns the teacher; default the
            store's teacher, unless that is one of your own.
        checkpoint: Its weights (safetensors or torch file); default timm's pretrained weights.
        pretrained: Without a checkpoint: fetch timm's weights for this name; --teacher.no-pretrained takes random
            ones, for tests.
        model_kwargs: Extra arguments of timm.create_model, or of that function, as JSON; default the store's.
        depth: Number of later blocks of a plain ViT; default the store's, or the last quarter.
        drop_prefix: Run them on grid tokens alone for the student; default as the store says, or off.
        compute_dtype: dtype of its forward pass (autocast below float32); default the store's, or float32.
    """

    name: str | None = None
    checkpoint: Path | None = None
    pretrained: bool = True
    model_kwargs: JsonObject = field(default_factory=dict)
    depth: int | None = None
    drop_prefix: bool | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None


@dataclass(frozen=True)
class LiveTeacher(LiveOptions):
    """A teacher in the training process, on the student's device; LiveOptions has its other fields.

    Attributes:
        store: Replay this store's views, and refuse another teacher than the one it was written with.
        replay: Use of that store's views.
        views: Views of a run without a store.
    """

    store: str | Path | None = None
    replay: Replay = Replay()
    views: ViewsConfig = ViewsConfig()

    def __post_init__(self) -> None:
        """Refuse values no run could use, and options that would do nothing."""
        check_fields(self, "teacher.")
        if self.store is None and self.name is None:
            raise InputError("a live teacher without a store needs a name: give --teacher.name or --store")
        _require_used(self.store, self.replay, self.views)


@dataclass(frozen=True)
class NoTeacher:
    """No teacher: the student's own task on newly drawn views.

    Attributes:
        views: Policy and seed of the views.
    """

    views: ViewsConfig = ViewsConfig()


TeacherConfig: TypeAlias = StoreTeacher | ServiceTeacher | LiveTeacher | NoTeacher | tuple[StoreTeacher, ...]


@dataclass(frozen=True)
@plain_defaults
class TeacherOptions:
    """Options of the command line, and of sweep files, that choose a run's teacher.

    Attributes:
        store: Store of the teacher's features: a directory, or a URL (s3://, gs://, http(s)://); several are several
            teachers of the same views.
        store_weights: With several stores: factor on each teacher's terms; default 1 each.
        source: Where features come from: store; live, a teacher in this process; http://host:port, a service's
            cached rows; or live+http://host:port, its live teacher. A service brings its own store.
        token_file: File with the service's bearer token; default the environment variable FEATURE_STORE_TOKEN.
        num_views: Use the store's first views only; default all. Epoch e uses view e mod this.
        check_all_pixels: Check the CRC of every view of a store; --no-check-all-pixels: of each unit's first 8 only,
            which saves 1 to 2 % of the time that workers take to make views.
        teacher: The live teacher.
        views: Views of a run without a store.
    """

    store: tuple[str, ...] = ()
    store_weights: tuple[float, ...] = ()
    source: str = "store"
    token_file: Path | None = None
    num_views: int | None = None
    check_all_pixels: bool = True
    teacher: LiveOptions = LiveOptions()
    views: ViewsConfig = ViewsConfig()

    def config(self) -> TeacherConfig:
        """The teacher they ask for.

        Raises:
            InputError: Options that do not go together.
        """
        check_fields(self)
        replay, url = Replay(self.num_views, self.check_all_pixels), self.source.removeprefix(_LIVE)
        served, weights = url.startswith(SCHEMES), self.store_weights or (1.0,) * len(self.store)
        self._check(served)
        if served:
            _require_used(url, replay, self.views)
            return ServiceTeacher(url, live=self.source != url, token_file=self.token_file, replay=replay)
        store = self.store[0] if self.store else None
        _require_used(store, replay, self.views)
        if self.source == "live":
            return LiveTeacher(**vars(self.teacher), store=store, replay=replay, views=self.views)
        if store is None:
            return NoTeacher(self.views)
        teachers = tuple(StoreTeacher(*pair, replay=replay) for pair in zip(self.store, weights, strict=True))
        return teachers if len(teachers) > 1 else StoreTeacher(store, weights[0], replay)

    def _check(self, served: bool) -> None:
        source = self.source
        if source not in ("store", "live") and not served:
            raise InputError(
                f"--source is {source!r}, expected store, live, http(s)://host:port or live+http(s)://host:port"
            )
        if source != "live" and self.teacher != LiveOptions():
            raise InputError("--teacher options are for --source live; leave them out or add --source live")
        if not served and self.token_file is not None:
            raise InputError("--token-file is for --source http://...; leave it out")
        if served and self.store:
            raise InputError(f"--source {source} brings its own store; leave out --store")
        if source == "live" and len(self.store) > 1:
            raise InputError("--source live takes at most one --store, whose views are replayed")
        if self.store_weights and len(self.store) < 2:
            raise InputError("--store-weights balances several stores, and there is one or none; leave it out")
        if self.store_weights and len(self.store_weights) != len(self.store):
            raise InputError(
                f"--store-weights has {len(self.store_weights)} values for {len(self.store)} stores; give one for each"
            )


def teacher_from_options(
    options: Annotated[TeacherOptions, tyro.conf.arg(name="")] = TeacherOptions(),
) -> TeacherConfig:
    """The teacher that options of the command line ask for."""
    return options.config()


def _require_used(store: object, replay: Replay, views: ViewsConfig) -> None:
    """Refuse options that would do nothing."""
    if store is not None and views != ViewsConfig():
        raise InputError("--views options are for runs without --store, whose own views are replayed")
    if store is None and replay.num_views is not None:
        raise InputError(
            "--num-views limits a store's views, and no store is given; add --store, or use --views.count without one"
        )
    if store is None and not replay.check_all_pixels:
        raise InputError("--no-check-all-pixels is for replayed views; without --store none are checked, leave it out")
