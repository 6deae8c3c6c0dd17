"""Text classifiers on a pretrained BERT encoder."""

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
"""Pattern of the names of parameters without weight decay."""


class TextClassifier(nn.Module):
    """A BERT encoder (Devlin et al., 2019), the mean of its vectors over the tokens of a text (Reimers and
    Gurevych, 2019), dropout and a linear layer."""

    def __init__(self, encoder: BertModel, num_classes: int, dropout: float):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.config.hidden_size, num_classes)

    def vectors(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The mean vector of each text, float32 (rows, hidden). `ids` and `mask` are int64 (rows, length);
        the mask is 1 at a token and 0 at padding."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The probability of each class, float32 (rows, classes). The arguments are those of `vectors`."""
        return self.probabilities(self.vectors(ids, mask))

    def probabilities(self, vectors: Tensor) -> Tensor:
        """The probability of each class, float32 (rows, classes), from mean vectors (rows, hidden)."""
        return self.head(vectors).float().softmax(dim=1)

    def loss(self, *batch: Tensor) -> Tensor:
        """The weighted mean log loss, float32 (), of ids, mask, labels int64 (rows,) and weights (rows,)."""
        ids, mask, y, weight = batch
        return self._log_loss(self.vectors(ids, mask), y, weight)

    def _log_loss(self, vectors: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        losses = cross_entropy(self.head(self.dropout(vectors)).float(), y, reduction="none")
        return (losses * weight).sum() / weight.sum()


class FrozenTextClassifier(TextClassifier):
    """A classifier that trains the linear layer only, so that each text's mean vector is computed once."""

    def __init__(self, encoder: BertModel, num_classes: int, dropout: float):
        super().__init__(encoder, num_classes, dropout)
        encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenTextClassifier":
        super().train(mode)
        self.encoder.eval()
        return self

    def loss(self, *batch: Tensor) -> Tensor:
        """The weighted mean log loss, float32 (), of mean vectors, labels and weights."""
        return self._log_loss(*batch)


def load_encoder(folder: Path) -> BertModel:
    """Load the encoder from `config.json` and `model.safetensors` in a folder, without any network access."""
    logging.set_verbosity_error()  # it would list the unused weights of the pretraining heads
    logging.disable_progress_bar()
    return BertModel.from_pretrained(
        folder, add_pooling_layer=False, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )


def new_encoder(config: dict[str, Any]) -> BertModel:
    """Make an encoder with random weights from the content of a `config.json`."""
    return BertModel(BertConfig(**config), add_pooling_layer=False)


def parameter_groups(network: TextClassifier, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW, each with `lr_scale`, a factor of the learning rate.

    The linear layer has the factor 1, the top layer of the encoder `layer_decay`, the layer below its square,
    and so on down to the embeddings (Howard and Ruder, 2018; Clark et al., 2020). Biases and norms have no
    weight decay.
    """
    num_layers = network.encoder.config.num_hidden_layers
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = re.match(r"encoder\.encoder\.layer\.(\d+)\.", name)
        depth = num_layers - int(layer[1]) if layer else num_layers + 1 if name.startswith("encoder.") else 0
        is_undecayed = bool(NO_DECAY.search(name))
        group = groups.setdefault((depth, is_undecayed), {"params": [], "lr_scale": layer_decay**depth})
        if is_undecayed:
            group["weight_decay"] = 0.0
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
