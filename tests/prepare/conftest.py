import fsspec
import pytest


@pytest.fixture(scope="session")
def s3_server():
    """The address of an S3 server that runs in this process."""
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def url_of_bucket(request, tmp_path, monkeypatch):
    """The URL of an empty place for files: a folder, or a bucket of a real S3 server."""
    if request.param == "file":
        yield f"file://{tmp_path}/bucket"
        return
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    filesystem.mkdir("bucket")
    yield "s3://bucket"
    filesystem.rm("bucket", recursive=True)
