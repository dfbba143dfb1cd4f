"""A real Kubernetes API server: the one of KUBECONFIG (a test cluster), or etcd and kube-apiserver started from KUBEBUILDER_ASSETS.

Everything that the tests apply is deleted again, for a cluster of KUBECONFIG outlives them.
"""

import contextlib
import gzip
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

import pytest
import urllib3
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import ResourceNotFoundError

CRDS = Path(__file__).parents[3] / "shared" / "crds" / "kserve"
START_S = 120


def wait_for(what, ready, processes=()):
    """Polls until `ready` gives something true; fails after START_S, or when a process has ended."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ApiException, OSError, urllib3.exceptions.HTTPError, ResourceNotFoundError):
            if found := ready():
                return found
        for process in processes:
            assert process.poll() is None, f"{process.args[0]} ended with {process.returncode}"
        time.sleep(0.1)
    pytest.fail(f"{what} is not ready after {START_S} s")


def free_ports(count):
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


@contextlib.contextmanager
def running(command, log):
    """A process of the test's own, ended with it."""
    with log.open("wb") as output:
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def api_server(assets, folder):
    """etcd and kube-apiserver in `folder`; gives an ApiClient once it answers /readyz."""
    etcd_port, peer_port, port = free_ports(3)
    token = uuid.uuid4().hex
    key = folder / "service-account.key"
    key.write_bytes(rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
    (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
    etcd = [
        *(assets / "etcd", f"--data-dir={folder}/etcd", "--unsafe-no-fsync"),
        *(f"--listen-client-urls=http://127.0.0.1:{etcd_port}", f"--advertise-client-urls=http://127.0.0.1:{etcd_port}"),
        f"--listen-peer-urls=http://127.0.0.1:{peer_port}",
    ]
    server = [
        *(assets / "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{etcd_port}", f"--cert-dir={folder}/certificates"),
        *("--bind-address=127.0.0.1", f"--secure-port={port}", "--service-cluster-ip-range=10.96.0.0/16"),
        *(
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
        ),
        *(f"--token-auth-file={folder}/tokens.csv", "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount"),
        *("--allow-privileged=true", "--endpoint-reconciler-type=none"),
    ]
    with running(etcd, folder / "etcd.log") as etcd_process, running(server, folder / "kube-apiserver.log") as server_process:
        certificate = folder / "certificates" / "apiserver.crt"
        processes = (etcd_process, server_process)
        wait_for("the API server's certificate", certificate.exists, processes)
        settings = client.Configuration(host=f"https://127.0.0.1:{port}", api_key={"authorization": f"Bearer {token}"})
        settings.ssl_ca_cert = str(certificate)
        with client.ApiClient(settings) as api, urllib3.PoolManager(ca_certs=str(certificate), retries=False) as http:
            headers = {"authorization": f"Bearer {token}"}
            wait_for("the API server", lambda: http.request("GET", f"{settings.host}/readyz", headers=headers).status == 200, processes)
            yield api


@pytest.fixture(scope="session")
def api(tmp_path_factory):
    """An ApiClient of the API server."""
    assets = Path(os.environ.get("KUBEBUILDER_ASSETS", "/nonexistent"))
    if os.environ.get("KUBECONFIG"):
        with config.new_client_from_config() as found:
            yield found
    elif shutil.which("kube-apiserver", path=assets):
        with api_server(assets, tmp_path_factory.mktemp("cluster")) as found:
            yield found
    else:
        pytest.skip("no API server: set KUBECONFIG, or KUBEBUILDER_ASSETS to a folder with etcd and kube-apiserver")


class Cluster:
    """Applies documents as `kubectl apply --server-side` does, and deletes what it applied."""

    def __init__(self, api, folder):
        self._dynamic = DynamicClient(api, cache_file=str(folder / "discovery.json"))
        self._applied = []

    def apply(self, document, namespace=None):
        resource = self._resource(document)
        done = resource.server_side_apply(
            body=document, namespace=namespace, field_manager="sluice-tests", force_conflicts=True, content_type="application/apply-patch+yaml"
        )
        self._applied.append((document, namespace))
        return done.to_dict()

    def read(self, document, namespace=None):
        return self._resource(document).get(name=document["metadata"]["name"], namespace=namespace).to_dict()

    def knows(self, document):
        return self._resource(document) is not None

    def clean_up(self):
        for document, namespace in reversed(self._applied):
            with contextlib.suppress(ApiException):
                self._resource(document).delete(name=document["metadata"]["name"], namespace=namespace)
        self._applied.clear()

    def _resource(self, document):
        return self._dynamic.resources.get(api_version=document["apiVersion"], kind=document["kind"])


@pytest.fixture(scope="session")
def kserve(api, tmp_path_factory):
    """The API server with KServe's resource definitions: those that are there, else those of ../shared."""
    cluster = Cluster(api, tmp_path_factory.mktemp("definitions"))
    runtime = {"apiVersion": "serving.kserve.io/v1alpha1", "kind": "ClusterServingRuntime"}
    service = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService"}
    try:
        cluster.knows(service)
    except ResourceNotFoundError:
        if not CRDS.is_dir():
            pytest.skip("KServe is not installed on this cluster, and its definitions are not here (../shared/crds/kserve)")
        for path in sorted(CRDS.glob("*.yaml.gz")):
            cluster.apply(yaml.load(gzip.decompress(path.read_bytes()), yaml.CSafeLoader))
    for document in (runtime, service):
        wait_for(document["kind"], lambda document=document: cluster.knows(document))
    yield api
    cluster.clean_up()


@pytest.fixture
def cluster(kserve, tmp_path):
    """A Cluster that is empty again afterwards."""
    made = Cluster(kserve, tmp_path)
    yield made
    made.clean_up()


@pytest.fixture
def namespace(cluster):
    """A namespace of the test's own."""
    name = f"sluice-{uuid.uuid4().hex[:8]}"
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name
