"""Pixels to embeddings and logits: the model stage, one actor a GPU (or a share of the cores).

Enters: a CHUNK of PIXELS. Leaves: the same CHUNK with rows of `embeddings/`. Knows tensors and one
schema; knows no storage and no Ray.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from cvt_model.checkpoint import resolve_checkpoint
from cvt_model.model import CvtForImageClassification
from pipeline import schema
from pipeline.decode import replace_rows
from pipeline.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EmbedOptions:
    """What an actor has to know: which weights, in which precision, to which columns.

    `checkpoint` is what the user named; `weights_sha256` makes sure that every actor, on whatever
    machine, loads the weights that the fingerprint names. `num_threads` is explicit, since Ray sets
    OMP_NUM_THREADS=1 inside its workers.
    """

    checkpoint: str
    weights_sha256: str
    precision: str
    embedding: str
    logits: schema.Logits
    dtype: str
    num_threads: int


class Embedder:
    """A loaded model: call it with a CHUNK."""

    def __init__(self, options: EmbedOptions) -> None:
        torch.set_num_threads(options.num_threads)
        checkpoint = resolve_checkpoint(options.checkpoint)
        if checkpoint.weights_sha256 != options.weights_sha256:
            raise InputError(
                f"model.checkpoint: {options.checkpoint} has other weights on this machine "
                f"({checkpoint.weights_sha256[:12]}) than the run began with "
                f"({options.weights_sha256[:12]}); it must not change while a run goes on"
            )
        self._options = options
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if options.precision == "float32":  # TF32 would cost three decimal digits
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        self._dtype = DTYPES[options.precision]
        self._processor = checkpoint.processor
        self._labels = [checkpoint.config.id2label[n] for n in range(checkpoint.num_labels)]
        self._num_labels = checkpoint.num_labels
        self._dim = checkpoint.config.embed_dim[-1]
        self._model = checkpoint.load(dtype=self._dtype, device=self._device)

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """A CHUNK of one row with its PIXELS turned into rows of `embeddings/`."""
        started = time.time()
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
        if pixels.num_rows:
            embedding_BD, logits_BC = self.embed(self._pixels_array(pixels))
        else:
            embedding_BD = torch.zeros(0, self._dim)
            logits_BC = torch.zeros(0, self._num_labels)
        columns |= self._result_columns(embedding_BD, logits_BC, table_schema)
        table = pa.table([columns[name] for name in table_schema.names], table_schema)
        return replace_rows(chunk, "model", started, table, [])

    @torch.inference_mode()
    def embed(self, pixels_BHWC: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 pixels (B, H, W, 3) to float32 embeddings (B, D) and logits (B, num_labels), on CPU."""
        pixels = torch.from_numpy(pixels_BHWC).to(self._device)
        pixel_values = self._processor.normalize(pixels, self._dtype)
        output = self._model(pixel_values)
        if isinstance(self._model, CvtForImageClassification):
            embedding, logits = output.embedding, output.logits
            if self._options.embedding == "cls_token":
                embedding = output.cls_token_value[:, 0]
        elif output.cls_token_value is not None:
            embedding, logits = output.cls_token_value[:, 0], None
        else:
            embedding, logits = output.last_hidden_state.mean(dim=(2, 3)), None
        if logits is None or not self._num_labels:
            logits = embedding.new_zeros(len(embedding), 0)
        return embedding.float().cpu(), logits.float().cpu()

    def _pixels_array(self, table: pa.Table) -> np.ndarray:
        """The pixels column as one array (B, H, W, 3), without a copy where it is one chunk."""
        column = table.column("pixels").combine_chunks()
        offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset :][: len(column) + 1]
        data = np.frombuffer(column.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        size = self._processor.output_size
        assert size is not None
        return data.reshape(len(column), *size, 3).copy()

    def _result_columns(
        self, embedding_BD: torch.Tensor, logits_BC: torch.Tensor, table_schema: pa.Schema
    ) -> dict[str, pa.Array]:
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
