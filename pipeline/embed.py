"""Pixels to embeddings and logits: the model stage, one actor a GPU (or a share of the cores).

Enters: a CHUNK of PIXELS. Leaves: the same CHUNK with rows of `embeddings/`. Knows tensors and one
schema; knows no storage and no Ray.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from cvt_model.backends import FeatureArrays
from cvt_model.checkpoint import resolve_checkpoint
from cvt_model.choices import BackendName, EmbeddingKind, Precision
from cvt_model.errors import CheckpointError
from cvt_model.inference import InferenceModel
from pipeline import schema
from pipeline.decode import replace_rows
from pipeline.errors import ConfigError, InputError


@dataclass(frozen=True)
class EmbedOptions:
    """What an actor has to know: which weights, run how, to which columns.

    `checkpoint` is what the user named; `weights_sha256` makes sure that every actor, on whatever
    machine, loads the weights that the fingerprint names. `num_threads` is explicit, since Ray sets
    OMP_NUM_THREADS=1 inside its workers.
    """

    checkpoint: str
    weights_sha256: str
    precision: Precision
    backend: BackendName | Literal["auto"]
    batch_size: int | Literal["auto"]
    embedding: EmbeddingKind
    logits: schema.Logits
    dtype: str
    num_threads: int


class Embedder:
    """A loaded model: call it with a CHUNK."""

    def __init__(self, options: EmbedOptions) -> None:
        checkpoint = resolve_checkpoint(options.checkpoint)
        if checkpoint.weights_sha256 != options.weights_sha256:
            raise InputError(
                f"model.checkpoint: {options.checkpoint} has other weights on this machine "
                f"({checkpoint.weights_sha256[:12]}) than the run began with "
                f"({options.weights_sha256[:12]}); it must not change while a run goes on"
            )
        self._options = options
        self._device = threading.Lock()  # calls overlap: one computes, another packs or unpacks
        self._processor = checkpoint.processor
        self._labels = [checkpoint.config.id2label[n] for n in range(checkpoint.num_labels)]
        self._num_labels = checkpoint.num_labels
        self._dim = checkpoint.config.embed_dim[-1]
        try:
            self._model = InferenceModel(
                checkpoint,
                precision=options.precision,
                backend=options.backend,
                num_threads=options.num_threads,
                batch_size=options.batch_size,
                embedding=options.embedding,
            )
        except CheckpointError as error:
            raise ConfigError(f"model.checkpoint: {error}") from error
        except ValueError as error:  # names the choice that cannot be met
            raise ConfigError(f"model.{error}") from error

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """A CHUNK of one row with its PIXELS turned into rows of `embeddings/`."""
        pixels = schema.unpack(chunk.column("rows")[0])
        assert pixels is not None
        metadata = schema.metadata_fields(pixels.schema, schema.PIXELS)
        table_schema = schema.embeddings_schema(
            dim=self._dim,
            num_labels=self._num_labels,
            logits=self._options.logits,
            dtype=self._options.dtype,
            metadata=metadata,
        )
        columns = {name: pixels.column(name) for name in pixels.column_names if name != "pixels"}
        pixels_BHWC = self._pixels_array(pixels)
        with self._device:
            computing = time.time()
            features = self.embed(pixels_BHWC)
            busy_s = time.time() - computing
        columns |= self._result_columns(features, table_schema)
        table = pa.table([columns[name] for name in table_schema.names], table_schema)
        return replace_rows(chunk, "model", time.time() - busy_s, table, [])

    def embed(self, pixels_BHWC: np.ndarray) -> FeatureArrays:
        """uint8 pixels (B, H, W, 3) to float32 embeddings (B, D) and logits (B, num_labels)."""
        return self._model(pixels_BHWC)

    def _pixels_array(self, table: pa.Table) -> np.ndarray:
        """The pixels column as one array (B, H, W, 3), without a copy where it is one chunk."""
        column = table.column("pixels").combine_chunks()
        offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset :][: len(column) + 1]
        data = np.frombuffer(column.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        size = self._processor.output_size
        assert size is not None
        return data.reshape(len(column), *size, 3)

    def _result_columns(self, features: FeatureArrays, table_schema: pa.Schema) -> dict[str, pa.Array]:
        embedding_BD, logits_BC = map(torch.from_numpy, features)
        columns = {"embedding": _vectors(embedding_BD, table_schema, "embedding")}
        if not self._num_labels:
            return columns
        if "logits" in table_schema.names:
            columns["logits"] = _vectors(logits_BC, table_schema, "logits")
        elif "top_ids" in table_schema.names:
            k = table_schema.field("top_ids").type.list_size
            top_logits_BK, top_ids_BK = logits_BC.topk(k, dim=1)
            columns["top_ids"] = _vectors(top_ids_BK, table_schema, "top_ids")
            columns["top_logits"] = _vectors(top_logits_BK, table_schema, "top_logits")
        score_B, label_B = logits_BC.softmax(dim=1).max(dim=1)
        columns["label"] = pa.array([self._labels[n] for n in label_B.tolist()], pa.string())
        columns["label_id"] = pa.array(label_B.numpy().astype(np.int32))
        columns["score"] = pa.array(score_B.numpy())
        return columns


def _vectors(values_BN: torch.Tensor, table_schema: pa.Schema, name: str) -> pa.Array:
    """Rows of a tensor (B, N) as a fixed-size list column of the schema's type."""
    kind = table_schema.field(name).type
    flat = values_BN.numpy().astype(kind.value_type.to_pandas_dtype()).ravel()
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), type=kind)
