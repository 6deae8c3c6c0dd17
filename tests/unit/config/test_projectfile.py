import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.config import Project, Training, projectfile
from app.errors import UserError

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))

TEXT = """\
name: small
data:
  source: {path: rows.csv, format: csv}
  label: {column: bought, positive: "yes"}
  columns:
    age: {type: number}
    town: {type: category}
features:
  age: {encode: min_max}
  town: {encode: one_hot}
model: {kind: mlp, hidden: [4]}
training:
  num_workers: 1
  epochs: 2
  batch_size: 8
  learning_rate: 0.1
serving:
  variants:
    champion: {version: champion, weight: 1}
"""


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(TEXT)
    return file


def faults(file: Path, *overrides: str) -> list[str]:
    """The lines of the error, without the folder of the file."""
    with pytest.raises(UserError) as caught:
        projectfile.load(file, overrides)
    return str(caught.value).replace(f"{file.parent}/", "").splitlines()


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, "the text to replace must occur once"
    file.write_text(text.replace(old, new))


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGED = "m0: &m0 {x: 1}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 100,000 keys"),
        (MERGED, "more than 100,000 keys"),
        ("a: " + "[" * 100_000, "deeper than 50 levels"),
        ("a: " + "[" * 200 + "]" * 200, "deeper than 50 levels"),
        ("a: &a [*a]", "deeper than 50 levels"),
        ("a: " + "x" * 1_000_001, "must not exceed 1,000,000 bytes"),
        ("a: " + "9" * 5_000, "is not valid YAML"),
    ],
    ids=["aliases", "merges", "brackets", "lists", "itself", "bytes", "digits"],
)
def test_a_file_that_would_be_expensive_to_parse_is_refused(file, text, message):
    file.write_text(text)
    (fault,) = faults(file)
    assert message in fault
    if len(text) < 1_000 and "\n" not in text:
        file.write_text(TEXT)
        (fault,) = faults(file, f"a={text.removeprefix('a: ')}")
        assert message in fault
        assert fault.startswith("--set a")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_project_loads_and_has_the_name_of_its_file(config):
    assert projectfile.load(config).name == config.stem


def test_shipped_projects_are_found():
    assert {"income.yaml", "smoke.yaml"} <= {config.name for config in CONFIGS}


def test_a_project_has_the_values_of_its_file_and_defaults(file):
    project = projectfile.load(file)
    assert project.data.columns["age"].type == "number"
    assert project.model.hidden == [4]
    assert (project.seed, project.data.split.test, project.gate.beat) == (0, 0.2, ["constant"])


@pytest.mark.parametrize("workers", [2, (1, 3)])
def test_a_project_is_the_same_after_json(file, workers):
    project = projectfile.load(file, [f"training.num_workers={json.dumps(workers)}"])
    assert project.training.num_workers == workers
    assert Project.model_validate_json(project.model_dump_json()) == project


@pytest.mark.parametrize("section", ["data", "model", "training", "serving"])
def test_a_project_is_frozen_at_every_level(file, section):
    project = projectfile.load(file)
    with pytest.raises(ValidationError):
        project.name = "other"
    part = getattr(project, section)
    with pytest.raises(ValidationError):
        setattr(part, next(iter(type(part).model_fields)), None)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "  epochs: 2",
            "  epochz: 2\n  epochs: 2",
            "small.yaml:14: training.epochz: unknown key (did you mean epochs?); allowed: "
            + ", ".join(sorted(Training.model_fields)),
        ),
        (
            "serving:",
            "sevring: {}\nserving:",
            "small.yaml:17: sevring: unknown key (did you mean serving?); allowed: compression, data, "
            "evaluation, features, gate, model, name, seed, serving, sweep, training",
        ),
        (
            "{type: number}",
            "{type: number, maximum: 3}",
            "small.yaml:6: data.columns.age.maximum: unknown key (did you mean max?); allowed: max, min, "
            "nullable, type",
        ),
        (
            "hidden: [4]}",
            "hidden: [4], zzz: 1}",
            "small.yaml:11: model.zzz: unknown key; allowed: dropout, hidden, kind",
        ),
        (
            "  epochs: 2\n",
            "",
            "small.yaml:12: training.epochs: is missing; the keys here are "
            + ", ".join(sorted(Training.model_fields)),
        ),
        (
            "{path: rows.csv, format: csv}",
            "{format: csv}",
            "small.yaml:3: data.source: give exactly one of 'sample' and 'path'",
        ),
        (
            "name: small",
            "name: Small One",
            "small.yaml:1: name: must have at most 63",
        ),
        ("champion, weight: 1", "champion, weight: -1", "small.yaml:19: serving.variants.champion.weight: "),
        ("learning_rate: 0.1", "learning_rate: .inf", "small.yaml:16: training.learning_rate: "),
    ],
)
def test_a_fault_names_its_line_its_key_and_the_allowed_values(file, old, new, expected):
    edit(file, old, new)
    (line,) = faults(file)
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("old", "new", "position", "message"),
    [
        ("epochs: 2", "epochs: soon", "small.yaml:14: training.epochs: ", "it is 'soon'"),
        ("epochs: 2", "epochs: 2.5", "small.yaml:14: training.epochs: ", "it is 2.5"),
        ("format: csv", "format: xlsx", "small.yaml:3: data.source.format: ", "'csv'; it is 'xlsx'"),
        ("hidden: [4]", "hidden: 4", "small.yaml:11: model.hidden: ", "must be a list; it is 4"),
        ("hidden: [4]", "hidden: [4, 0]", "small.yaml:11: model.hidden.1: ", "it is 0"),
        ("kind: mlp", "kind: forest", "small.yaml:11: model: ", "'linear', 'mlp'"),
        ("type: number", "type: date", "small.yaml:6: data.columns.age: ", "'number', 'category'"),
        ("type: number", "min: 0", "small.yaml:6: data.columns.age: ", "'type' is missing"),
        ("encode: min_max", "encode: log", "small.yaml:9: features.age: ", "'one_hot', 'embedding'"),
        ("  num_workers: 1", "  num_workers: 0", "small.yaml:13: training.num_workers: ", "it is 0"),
    ],
)  # fmt: skip
def test_the_fault_of_a_wrong_value_names_the_value_and_the_allowed_ones(file, old, new, position, message):
    edit(file, old, new)
    (line,) = faults(file)
    assert line.startswith(position)
    assert message in line


def test_all_faults_are_reported_together(file):
    edit(file, "epochs: 2", "epochs: soon")
    edit(file, "kind: mlp", "kind: mlp, depth: 3")
    edit(file, "  batch_size: 8\n", "")
    assert sorted(line.split(": ")[1] for line in faults(file)) == [
        "model.depth",
        "training.batch_size",
        "training.epochs",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "  town: {encode: one_hot}",
            "  town: {encode: one_hot}\n  city: {encode: one_hot}",
            "small.yaml:11: features.city: no such column; data.columns has age, town",
        ),
        (
            "age: {encode: min_max}",
            "age: {encode: one_hot}",
            "small.yaml:9: features.age: a number takes min_max, quantile or piecewise_linear, not one_hot",
        ),
        (
            "town: {encode: one_hot}",
            "town: {encode: min_max}",
            "small.yaml:10: features.town: a category takes one_hot or embedding, not min_max",
        ),
        (
            "age: {encode: min_max}",
            "probability: {encode: min_max}",
            "small.yaml:9: features.probability: the model's output has this name; rename the column",
        ),
        (
            '{column: bought, positive: "yes"}',
            "{column: bought}",
            "small.yaml:4: data.label: give exactly one of 'positive', 'above' and 'classes'",
        ),
        (
            '{column: bought, positive: "yes"}',
            '{column: bought, positive: "yes", above: 3}',
            "small.yaml:4: data.label: give exactly one of 'positive', 'above' and 'classes'",
        ),
        (
            '{column: bought, positive: "yes"}\n',
            '{column: bought, positive: "yes"}\n  split: {by: time}\n',
            "small.yaml:5: data.split: column: must be given with by: time, and left out with by: content",
        ),
        (
            '{column: bought, positive: "yes"}\n',
            '{column: bought, positive: "yes"}\n  split: {column: day}\n',
            "small.yaml:5: data.split: column: must be given with by: time, and left out with by: content",
        ),
        (
            "column: bought",
            "column: town",
            "small.yaml:4: data.label.column: 'town' must not be one of data.columns",
        ),
    ],
)
def test_sections_must_fit_one_another(file, old, new, expected):
    edit(file, old, new)
    assert faults(file) == [expected]


def test_a_split_must_leave_training_rows(file):
    edit(file, "features:", "  split: {validation: 0.5, test: 0.5}\nfeatures:")
    (line,) = faults(file)
    assert line.startswith("small.yaml:8: data.split: ")
    assert "train" in line


def test_min_replicas_must_not_exceed_max_replicas(file):
    edit(file, "serving:", "serving:\n  autoscaling: {min_replicas: 3, max_replicas: 2}")
    assert faults(file) == ["small.yaml:18: serving.autoscaling: max_replicas must be at least min_replicas"]


def test_a_repeated_key_is_refused_with_both_lines(file):
    edit(file, "  batch_size: 8", "  epochs: 5\n  batch_size: 8")
    assert faults(file) == ["small.yaml:15: training.epochs: must occur once; keep this one or line 14"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a mapping with the keys compression, data"),
        (b"# only a remark\n", "must be a mapping"),
        (b"- name: small\n", "must be a mapping"),
        (b"just words\n", "must be a mapping"),
        (b"name: [small\n", "is not valid YAML"),
        (b"name: small\n\tseed: 1\n", "is not valid YAML"),
        (b"name: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        (b"name: a\x00b\n", "is not valid YAML"),
        (b"\xff\xfe\x00\x01PAR1", "cannot be read as a text file"),
    ],
)
def test_a_file_that_is_not_a_mapping_is_refused(file, content, message):
    file.write_bytes(content)
    assert faults(file)[0].startswith(f"small.yaml: {message}")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert faults(tmp_path / "none.yaml") == [
        "none.yaml: no such project file; the shipped ones are in configs/"
    ]
    (tmp_path / "folder").mkdir()
    assert faults(tmp_path / "folder")[0].startswith("folder: cannot be read as a text file")


def test_overrides_replace_and_add_keys_with_yaml_values(file):
    project = projectfile.load(
        file,
        ["training.epochs=7", "seed=3", "model.hidden=[8, 4]", "gate.minimum.auc=0.7",
         "data.split={test: 0.3}", "serving.salt='a=b'", "data.columns.age.nullable=true",
         "model.dropout=0.25"],
    )  # fmt: skip
    assert project.training.epochs == 7
    assert project.training.batch_size == 8
    assert project.seed == 3
    assert project.model.hidden == [8, 4]
    assert project.gate.minimum == {"auc": 0.7}
    assert project.data.split.test == 0.3
    assert project.serving.salt == "a=b"
    assert project.data.columns["age"].nullable is True
    assert project.model.dropout == 0.25


def test_the_last_override_of_a_key_wins(file):
    assert projectfile.load(file, ["training.epochs=7", "training.epochs=9"]).training.epochs == 9


@pytest.mark.parametrize("override", ["training.epochs", "=3", "training..epochs=3", ".=1", ""])
def test_a_malformed_override_is_refused_with_the_form_that_it_must_have(file, override):
    (line,) = faults(file, override)
    assert line.startswith(f"--set {override}: must be of the form key.key=value")


def test_an_override_whose_value_is_not_yaml_is_refused(file):
    assert faults(file, "training.epochs=[1")[0].startswith("--set training.epochs: is not valid YAML")


def test_an_override_of_a_key_below_a_value_is_refused(file):
    assert faults(file, "training.epochs.first=1") == [
        "--set training.epochs.first=1: 'epochs' is a value, so it has no keys"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=soon", "training.epochs: "),
        ("training.epochz=1", "training.epochz: unknown key (did you mean epochs?)"),
        ("model.hidden=[0]", "model.hidden.0: "),
        ("features.city={encode: one_hot}", "features.city: no such column"),
        ("features.city.encode=one_hot", "features.city: no such column"),
        ("features.age.encode=one_hot", "features.age: a number takes min_max"),
        ("data.label.column=town", "data.label.column: 'town' must not be one of data.columns"),
        ("data.split.test=0.95", "data.split: "),
        ("serving.autoscaling.min_replicas=4", "serving.autoscaling: "),
    ],
)
def test_the_fault_of_an_override_names_no_line_of_the_file(file, override, message):
    (line,) = faults(file, override)
    assert line.startswith(f"--set: {message}")


def test_periodic_embeddings_need_encodings_of_one_column(file):
    edit(file, "hidden: [4]", "hidden: [4], numbers: {embed: periodic}")
    assert projectfile.load(file).model.numbers.frequencies == 32
    edit(file, "age: {encode: min_max}", "age: {encode: piecewise_linear}")
    assert faults(file) == [
        "small.yaml:9: features.age: model.numbers is periodic, which takes numbers of one column: set "
        "min_max or quantile, or model.numbers: {embed: linear}"
    ]


def test_the_fault_of_an_unknown_embedding_lists_the_known_ones(file):
    edit(file, "hidden: [4]", "hidden: [4], numbers: {embed: polynomial}")
    (fault,) = faults(file)
    assert fault.startswith("small.yaml:11: model.numbers: ")
    assert "'none', 'linear', 'periodic'" in fault


def test_a_label_may_be_a_number_beyond_a_threshold(file):
    edit(file, 'positive: "yes"', "above: 15")
    assert projectfile.load(file).data.label.outcome == "above 15"


def test_data_names_has_all_columns_that_are_read(file):
    edit(file, 'positive: "yes"}', 'positive: "yes"}\n  split: {by: time, column: day}')
    assert projectfile.load(file).data.names == ["age", "town", "bought", "day"]


TWEETS = TEXT.replace('positive: "yes"', "classes: [bad, good]").replace(
    "mlp, hidden: [4]", "text_classifier, encoder: minilm"
)
TWEETS = TWEETS.replace("age: {type: number}", "words: {type: text}").replace(
    "  age: {encode: min_max}\n", ""
)
TWEETS = TWEETS.replace("town: {encode: one_hot}", "words: {encode: tokens, max_length: 32}")
TWEETS += "gate: {metric: macro_f1, beat: [tfidf_logistic_regression]}\nevaluation: {slices: [town]}\n"


@pytest.fixture
def tweets(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(TWEETS)
    return file


def test_a_project_with_a_text_classifier_loads(tweets):
    project = projectfile.load(tweets)
    assert project.data.label.classes == ["bad", "good"]
    assert project.features["words"].max_length == 32
    assert (project.model.layer_decay, project.model.freeze) == (0.9, False)
    assert project.evaluation.slices == ["town"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "classes: [bad, good]",
            'positive: "good"',
            "4: data.label.classes: model.kind text_classifier needs them",
        ),
        ("[bad, good]", "[bad, bad]", "4: data.label: classes: must be distinct"),
        ("{encode: tokens, max_length: 32}", "{encode: one_hot}", "9: features.words: a text takes tokens"),
        (
            "  words: {encode",
            "  town: {encode: one_hot}\n  words: {encode",
            "8: features: model.kind text_classifier takes one",
        ),
        (
            "text_classifier, encoder: minilm",
            "linear",
            "4: data.label.classes: model.kind linear takes a binary label",
        ),
        (
            "metric: macro_f1",
            "metric: auc",
            "19: gate.metric: with model.kind text_classifier, must be one of macro_f1, accuracy",
        ),
        (
            "tfidf_logistic_regression",
            "gradient_boosting",
            "19: gate.beat: with model.kind text_classifier, must be one of constant",
        ),
        ("slices: [town]", "slices: [words]", "20: evaluation.slices: 'words' must be a category"),
        ("max_length: 32", "max_length: 2", "9: features.words.max_length: "),
    ],
)
def test_the_sections_of_a_text_project_must_fit_one_another(tweets, old, new, expected):
    edit(tweets, old, new)
    (line,) = faults(tweets)
    assert line.startswith(f"small.yaml:{expected}")


def test_a_tabular_model_accepts_no_text_column(file):
    edit(file, "town: {type: category}", "town: {type: text}")
    edit(file, "town: {encode: one_hot}", "town: {encode: tokens}")
    (line,) = faults(file)
    assert line.startswith("small.yaml:10: features.town: model.kind mlp takes no text")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        *((text, text) for text in ("no", "YES", "on", "1:30", "010", "1", "1.50", "1e3", "true", "0x1F")),
        *((text, text) for text in ("2013-01-01", "18_0")),
        ("'1'", "1"),
        ('">50K"', ">50K"),
    ],
)
def test_a_string_keeps_its_spelling_even_if_it_looks_like_another_type(file, written, read):
    edit(file, '"yes"', written)
    assert projectfile.load(file).data.label.positive == read
    assert projectfile.load(file, [f"data.label.positive={written}"]).data.label.positive == read


def test_the_fault_of_a_string_that_needs_quotes_names_them(file):
    edit(file, '"yes"', ">50K")
    assert faults(file)[-1].endswith("put text that starts with such a character in quotes")


def test_strings_in_lists_and_keys_keep_their_spelling(file):
    edit(file, "town: {type: category}", "2013: {type: category, values: [no, 1, 02, 3.10, off]}")
    edit(file, "town: {encode", "2013: {encode")
    edit(file, "version: champion", "version: 1")
    edit(file, "features:", "  missing: [-9, n/a, .5]\nfeatures:")
    project = projectfile.load(file)
    assert project.data.columns["2013"].values == ["no", "1", "02", "3.10", "off"]
    assert project.serving.variants["champion"].version == "1"
    assert project.data.missing == ["-9", "n/a", ".5"]


def test_numbers_with_a_leading_zero_are_decimal(file):
    project = projectfile.load(file, ["training.epochs=010", "training.learning_rate=1e-3", "seed=0"])
    assert (project.training.epochs, project.training.learning_rate) == (10, 0.001)


@pytest.mark.parametrize("written", ["18_0", "'18_0'"])
def test_a_number_with_an_underscore_is_refused(file, written):
    assert faults(file, f"training.epochs={written}") == [
        "--set: training.epochs: must be a number without underscores; it is '18_0'"
    ]
    edit(file, "epochs: 2", f"epochs: {written}")
    (line,) = faults(file)
    assert line.startswith("small.yaml:14: training.epochs: must be a number without underscores")


@pytest.mark.parametrize("written", ["null", "~"])
def test_null_in_place_of_a_string_is_refused_with_advice(tweets, written):
    edit(tweets, "[bad, good]", f"[{written}, good]")
    (line,) = faults(tweets)
    advice = f'"{written}"'
    assert line.endswith(f"to give it as text, put it in quotes: {advice}")
    edit(tweets, f"[{written}, good]", f"[{advice}, good]")
    assert projectfile.load(tweets).data.label.classes == [written, "good"]


def test_the_classes_that_a_message_suggests_are_valid(tweets):
    edit(tweets, "classes: [bad, good]", "positive: good")
    (line,) = faults(tweets)
    edit(tweets, "positive: good", line.partition("such as ")[2])
    assert projectfile.load(tweets).data.label.classes == ["no", "yes"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("column: bought", "column: __label__", "the column '__label__' cannot be used: names between"),
        (
            "town: {type",
            "'': {type: category}\n    town: {type",
            "the column '' cannot be used: its name is empty",
        ),
        ("{type: category}", "{type: category, values: [a, '']}", "columns.town.values: '' means a"),
    ],
)
def test_unusable_columns_are_refused(file, old, new, message):
    edit(file, old, new)
    (line,) = faults(file)
    assert message in line


def test_classes_must_not_be_columns_of_the_predictions(tweets):
    edit(tweets, "[bad, good]", "[label, good]")
    (line,) = faults(tweets)
    assert "'label' is a column of the answers; rename" in line
