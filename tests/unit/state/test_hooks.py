from app.state import hooks


def test_faults_are_kept_by_source_until_the_source_reports_none():
    assert list(hooks.reported()) == []
    hooks.report("training", [])
    hooks.report("training", ["one", "two"])
    hooks.report("haproxy-a", ["three"])
    assert list(hooks.reported()) == ["haproxy-a: three", "training: one", "training: two"]
    hooks.report("training", ["four"])
    hooks.report("haproxy-a", [])
    assert list(hooks.reported()) == ["training: four"]
