from app.serving.protocols import docs_page


def test_the_page_loads_its_assets_from_this_server_and_nothing_else():
    page = docs_page.page()
    assert page.startswith(b"<!doctype html>")
    for name in docs_page.ASSETS:
        assert f"/v2/docs/{name}".encode() in page
        assert len(docs_page.asset(name)) > 10_000
    assert b"http://" not in page
    assert b"https://" not in page
