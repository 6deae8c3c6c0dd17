from app.serving import names


def test_only_the_applications_of_endpoints_are_models():
    workers = names.workers_application("income", "3")
    applications = ["income", workers, names.ROOT, names.GRPC, names.WATCH, "flights-2"]
    assert names.model_names(applications) == ["income", "flights-2"]


def test_workers_of_different_versions_have_different_applications():
    assert names.workers_application("income", "3") != names.workers_application("income", "4")
