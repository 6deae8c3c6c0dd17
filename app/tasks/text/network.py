"""A classifier on a pretrained BERT encoder."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertModel
from transformers.utils import logging

NO_DECAY = re.compile(r"\bbias$|LayerNorm\.")


class TextClassifier(nn.Module):
    """A BERT encoder (Devlin et al., 2019), the mean of its vectors over a text's tokens (Reimers and
    Gurevych, 2019), dropout and a linear layer."""

    def __init__(self, encoder: BertModel, num_classes: int, dropout: float):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.config.hidden_size, num_classes)

    def vectors(self, ids: Tensor, mask: Tensor) -> Tensor:
        """int64 (rows, length) of tokens and of 1 where there is one -> float32 (rows, hidden)."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        there = mask[:, :, None].to(states.dtype)
        return (states * there).sum(dim=1) / there.sum(dim=1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The probability of each class, (rows, classes)."""
        return self.probabilities(self.vectors(ids, mask))

    def probabilities(self, vectors: Tensor) -> Tensor:
        """The same of the encoder's vectors (rows, hidden)."""
        return self.head(vectors).float().softmax(dim=1)

    def loss(self, *batch: Tensor) -> Tensor:
        """The mean log loss of (ids, mask, y, weight), weighted by row; y is int64 (rows,)."""
        ids, mask, y, weight = batch
        return self._log_loss(self.vectors(ids, mask), y, weight)

    def _log_loss(self, vectors: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        losses = cross_entropy(self.head(self.dropout(vectors)).float(), y, reduction="none")
        return (losses * weight).sum() / weight.sum()


class FrozenTextClassifier(TextClassifier):
    """The same with an encoder that keeps its weights, so that its vectors need to be made only once."""

    def __init__(self, encoder: BertModel, num_classes: int, dropout: float):
        super().__init__(encoder, num_classes, dropout)
        encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenTextClassifier":
        super().train(mode)
        self.encoder.eval()
        return self

    def loss(self, *batch: Tensor) -> Tensor:
        """The same of (vectors, y, weight)."""
        return self._log_loss(*batch)


def load_encoder(folder: Path) -> BertModel:
    """The encoder in a folder with `config.json` and `model.safetensors`; nothing else is read or asked."""
    logging.set_verbosity_error()  # it would list the parts of the pretraining that are left behind
    logging.disable_progress_bar()
    return BertModel.from_pretrained(
        folder, add_pooling_layer=False, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )


def new_encoder(config: dict[str, Any]) -> BertModel:
    """An encoder with random weights, by the keys of a `config.json`."""
    return BertModel(BertConfig(**config), add_pooling_layer=False)


def parameter_groups(network: TextClassifier, layer_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW of all parameters that learn, each with `lr_scale` for its learning rate.

    The head has scale 1, the topmost layer `layer_decay`, the one below its square, and so on down to the
    embeddings (Howard and Ruder, 2018; Clark et al., 2020). Biases and norms have no weight decay.
    """
    num_layers = network.encoder.config.num_hidden_layers
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = re.match(r"encoder\.encoder\.layer\.(\d+)\.", name)
        depth = num_layers - int(layer[1]) if layer else num_layers + 1 if name.startswith("encoder.") else 0
        plain = bool(NO_DECAY.search(name))
        group = groups.setdefault((depth, plain), {"params": [], "lr_scale": layer_decay**depth})
        if plain:
            group["weight_decay"] = 0.0
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
