"""SampleSource: the samples of one unit, read at random positions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from feature_store.errors import ImageError, InputError, Remedy
from feature_store.views import decode_image

NO_LABEL = -1
"""Label of a sample that has none, here and in stores."""

_NOTES = 5  # notes shown


class Sample(NamedTuple):
    """One sample: key, encoded image, class index (NO_LABEL if it has none)."""

    key: str
    image: bytes
    label: int


@runtime_checkable
class SampleSource(Protocol):
    """The samples of one unit: a tar, or a slice of a folder or of parquet files.

    Sources are pickled to worker processes, and read from several threads at once.
    """

    @property
    def url(self) -> str:
        """Where the samples are, for messages."""
        ...

    @property
    def name(self) -> str:
        """Short name, kept in the store."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """Sample keys; a sample's index here is its position."""
        ...

    @property
    def header_sha256(self) -> str:
        """Hash of what is known without reading images: by it later commands find a unit's source."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Facts that the user should know: skipped files, and so on."""
        ...

    @property
    def problems(self) -> Mapping[int, str]:
        """Reasons why samples cannot be used, by position, as far as they are known without reading images."""
        ...

    def __len__(self) -> int: ...

    def read(self, position: int) -> Sample:
        """Image bytes and label of the sample at a position.

        Raises:
            ImageError: The sample has no usable image or label; the message is the reason to quarantine it.
            InputError: No such position, or the files changed since they were listed.
            ResourceError: The files cannot be read.
        """
        ...

    def label(self, position: int) -> int:
        """Class index of the sample at a position, without its image; errors as for read."""
        ...

    def content_sha256(self) -> str:
        """Hash of header, labels and parts of images: differs for sources that only have equal headers."""
        ...


def require_position(source: SampleSource, position: int) -> None:
    """Refuse a position that a source does not have, or whose sample is known to be unusable.

    Raises:
        InputError: No such position.
        ImageError: The sample cannot be used.
    """
    if not 0 <= position < len(source):
        raise InputError(f"{source.url} has no position {position}, expected 0 to {len(source) - 1}")
    if position in source.problems:
        raise ImageError(source.problems[position])


def require_usable(sources: Sequence[SampleSource], what: str, remedy: str, command: Remedy | None = None) -> None:
    """Refuse sources without a single usable sample; stops at the first usable one.

    Args:
        sources: The sources.
        what: Their noun, in the plural: ``tars``.
        remedy: The next step.
        command: The command or option that is another one.

    Raises:
        InputError: None of the samples can be used.
    """
    first = ""
    for source, position in ((each, position) for each in sources for position in range(len(each))):
        try:
            decode_image(source.read(position).image)
        except ImageError as error:
            first = first or f"{source.keys[position]!r} of {source.url}: {error}"
        else:
            return
    raise InputError(
        f"none of the {sum(map(len, sources))} samples of {len(sources)} {what} can be used; the first, {first}. "
        f"{remedy}",
        remedy=command,
    )


def source_notes(sources: Sequence[SampleSource]) -> list[str]:
    """Notes about sources for the user before a job starts, at most a few lines."""
    unusable = [(source, position) for source in sources for position in source.problems]
    notes = [note for source in sources for note in source.notes]
    shown = notes[:_NOTES] + ([f"and {len(notes) - _NOTES} more notes of this kind"] if len(notes) > _NOTES else [])
    if unusable:
        source, position = unusable[0]
        first = f"the first, {source.keys[position]!r} of {source.url}: {source.problems[position]}"
        shown.append(f"{len(unusable)} of {sum(map(len, sources))} samples cannot be used; {first}")
    return shown
