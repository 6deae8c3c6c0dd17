"""Models of one text and a label of several classes."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from app.config.data import Tokens
from app.config.families.model import Model, require_label
from app.config.gate import CLASS_METRICS

if TYPE_CHECKING:
    from app.config.project import Project


class TextClassifier(Model):
    """A pretrained BERT encoder, fine-tuned, with a linear layer on the mean of its tokens' vectors."""

    kind: Literal["text_classifier"]
    encoder: str
    """A sample such as `minilm`, or a folder with `config.json`, `model.safetensors` and `tokenizer.json` as
    Hugging Face's transformers writes them."""
    freeze: bool = False
    """Train the linear layer alone and leave the encoder as it is: minutes instead of hours, and less exact.
    Needs more epochs and a learning rate of about 0.01."""
    layer_decay: float = Field(0.9, gt=0, le=1)
    """Learning rate of each layer, as a share of that of the layer above. Lower layers hold what all texts
    have in common and should change less (Howard and Ruder, 2018)."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the mean vector's components that are set to 0 in training; the encoder has its own."""

    @property
    def score(self) -> str:
        return "macro_f1"

    @property
    def test_metrics(self) -> tuple[str, ...]:
        return CLASS_METRICS

    @property
    def baselines(self) -> tuple[str, ...]:
        return ("constant", "tfidf_logistic_regression")

    @property
    def tokenizer(self) -> str:
        return self.encoder

    @property
    def data_settings(self) -> tuple[str, ...]:
        return ("encoder",)

    def check(self, project: "Project") -> None:
        require_label(project, classes=True)
        if [type(encoding) for encoding in project.features.values()] != [Tokens]:
            raise ValueError(
                f"features: model.kind {self.kind} takes one text, such as text: {{encode: tokens}}"
            )
