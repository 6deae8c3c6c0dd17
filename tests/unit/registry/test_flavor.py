import mlflow
import numpy as np

from app.bundle import bundle
from app.bundle.bundle import Bundle
from app.bundle.schema import columns_of
from app.registry import connection, versions
from tests.bundles import ROWS
from tests.versions import registered


def test_mlflow_predicts_the_same(bundles):
    version = registered("pyfunc", bundles[0])
    opened = Bundle(version.path)
    columns = columns_of(opened.schema, ROWS)
    mlflow.set_tracking_uri(connection.uri())
    mlflow.set_registry_uri(connection.uri())
    model = mlflow.pyfunc.load_model(f"models:/pyfunc@{versions.CHAMPION}")
    probabilities = model.predict(bundle.feed_of(columns))["probability"]
    np.testing.assert_array_equal(np.ravel(probabilities), opened.predict(columns))
