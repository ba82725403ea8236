"""Features over HTTP: a service's cached rows, or its live teacher."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from feature_store.client.connection import connect, read_token
from feature_store.source import FeatureSource
from feature_store.teacher.torch_codecs import TorchDecoder
from student_trainer.data.batch import Batch
from student_trainer.methods.base import Needs, TeacherOutput, TeacherShape
from student_trainer.teachers.base import TeacherSide, decoded, require_same_teacher, tail_of
from student_trainer.teachers.config import ServiceTeacher


class ServiceSide(TeacherSide):
    """A teacher behind a service, whose store's views are replayed."""

    def __init__(self, config: ServiceTeacher, device: torch.device) -> None:
        """Connect.

        Raises:
            UserError: It cannot be reached, refuses the token, or is no service of a store.
        """
        token = None if config.token_file is None else read_token(config.token_file)
        self._client, self.computes = connect(config.url, token), config.live
        super().__init__(device, store=self._client.store, replay=config.replay)
        codecs = {} if config.live else self._client.store.layout.codecs
        self._decoders = {tap: TorchDecoder(codec) for tap, codec in codecs.items()}

    def shapes(self) -> tuple[TeacherShape, ...]:
        """The store's teacher; its later blocks are built here, from what the service gives."""
        manifest = self._client.manifest
        return (TeacherShape(manifest.split, manifest.teacher.num_classes, tail_of(self._client.store, self.device)),)

    def sources(self, needs: Sequence[Needs]) -> tuple[FeatureSource, ...]:
        """Rows of the service, or its live teacher.

        Raises:
            MismatchError: Its live teacher is not the one its store was written with.
        """
        (own,) = needs
        if not (own.taps or own.logits):
            return ()
        if not self.computes:
            return (self._client.source(own.taps),)
        source = self._client.live(own.taps)
        require_same_teacher(self._client.manifest, source.info, source.split)
        return (source,)

    def outputs(self, batch: Batch, pixels_BHWC: Tensor, needs: Sequence[Needs]) -> tuple[TeacherOutput, ...]:
        """Values as the live teacher computed them, or decoded from rows as stored."""
        return tuple(decoded(raw, self._decoders, self.device, needs[0]) for raw in batch.features)

    def identity(self) -> dict[str, Any]:
        """Cached rows are the same wherever they come from; computed ones are so on one machine at best."""
        return {
            "features": "live, by a service" if self.computes else "cached",
            "store": self._client.manifest.identity(),
            "weights": 1.0,
            "live_teacher": None,
        }
