"""Rates, latencies and GPUs from a real Prometheus; credentials and errors from a server that answers as told."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from contracts.errors import InvalidValue, NotFound, SluiceError, Unavailable
from contracts.units import S
from simulator.planning import metrics
from simulator.planning import prometheus as api
from simulator.planning.demand import of_rates
from simulator.planning.metrics import Asked
from simulator.planning.prometheus import Prometheus, Window

BEGIN = 1_760_000_040
"""A whole minute."""
MINUTES = 30
WINDOW = Window(BEGIN + MINUTES * 60, 60, MINUTES)
KEYS = ("team-a/vision", "team-b/text", "team-b/quiet")


def counter(per_minute: float, *, reset_at: int | None = None, begin: int = 0, each_s: int = 15) -> list[tuple[int, float]]:
    """A counter that grows evenly from two minutes before the window on, and begins anew at 0 at a minute."""
    found, value = [], 100.0
    for at in range(BEGIN - 120 + begin * 60, BEGIN + MINUTES * 60 + 1, each_s):
        if reset_at is not None and at == BEGIN + reset_at * 60:
            value = 0.0
        found.append((at, value))
        value += per_minute * each_s / 60
    return found


def knative(namespace: str, service: str, pod: str, part: str = "count") -> str:
    return (
        f'kn_serving_invocation_duration_seconds_{part}{{k8s_namespace_name="{namespace}",kn_configuration_name="{service}",'
        f'k8s_pod_name="{pod}",http_response_status_code="200"}}'
    )


def opencensus(metric: str) -> str:
    return f'{metric}{{namespace_name="team-a",configuration_name="old-predictor-default",pod_name="p"}}'


def gpu(pod: str, resource: str = "nvidia_com_gpu") -> str:
    return f'kube_pod_container_resource_requests{{namespace="team-a",pod="{pod}",container="kserve-container",resource="{resource}"}}'


def phase(pod: str, name: str) -> str:
    return f'kube_pod_status_phase{{namespace="team-a",pod="{pod}",phase="{name}"}}'


def gauge(value: float, until: int = MINUTES) -> list[tuple[int, float]]:
    return [(at, value) for at in range(BEGIN - 120, BEGIN + until * 60 + 1, 15)]


SAMPLES = {
    # Two pods of one function, one of them restarted; a second one that is called from the tenth minute on; somebody else's.
    knative("team-a", "vision-predictor", "vision-1"): counter(6, reset_at=12),
    knative("team-a", "vision-predictor", "vision-2"): counter(12),
    knative("team-b", "text-predictor", "text-1"): counter(30, begin=12),
    knative("team-c", "vision-predictor", "vision-1"): counter(600),
    knative("team-a", "vision-predictor", "vision-1", "sum"): counter(6 * 0.040, reset_at=12),
    knative("team-a", "vision-predictor", "vision-2", "sum"): counter(12 * 0.040),
    knative("team-b", "text-predictor", "text-1", "sum"): counter(30 * 0.2, begin=12),
    opencensus("revision_app_request_count"): counter(24),
    opencensus("revision_app_request_latencies_count"): counter(24),
    opencensus("revision_app_request_latencies_sum"): counter(24 * 55),
    'request_predict_seconds_count{model_name="twin"}': counter(6),
    'sluice_request_seconds_count{function="team-a/own"}': counter(18),
    gpu("vision-predictor-00001-deployment-x"): gauge(1),
    gpu("vision-predictor-00001-deployment-y"): gauge(1),
    gpu("vision-predictor-00001-deployment-z"): gauge(1),
    gpu("vision-predictor-00001-deployment-x", "cpu"): gauge(4),
    phase("vision-predictor-00001-deployment-x", "Running"): gauge(1),
    phase("vision-predictor-00001-deployment-y", "Running"): gauge(1, until=14),
    phase("vision-predictor-00001-deployment-z", "Running"): gauge(0),
    phase("vision-predictor-00001-deployment-z", "Succeeded"): gauge(1),
}


@pytest.fixture(scope="module")
def server(prometheus: Callable[[metrics.Mapping[str, list[tuple[int, float]]]], str]) -> Prometheus:
    return Prometheus(prometheus(SAMPLES) + "/")


def test_rates_of_all_pods_are_summed_through_a_restart(server: Prometheus) -> None:
    found = metrics.rates(server, KEYS, WINDOW, Asked())

    assert (found.source, found.silent) == ("knative", ("team-b/quiet",))
    assert found.per_s.shape == (3, MINUTES)
    calm = np.r_[0:11, 15:MINUTES]
    np.testing.assert_allclose(found.per_s[0, calm], 18 / 60, rtol=0.01)
    assert found.per_s[0].mean() * 60 == pytest.approx(18, rel=0.03)
    assert not found.per_s[1, :8].any()
    np.testing.assert_allclose(found.per_s[1, 13:], 30 / 60, rtol=0.01)
    assert not found.per_s[2].any()


def test_rates_become_as_many_calls(server: Prometheus) -> None:
    rates = metrics.rates(server, KEYS, WINDOW, Asked()).per_s
    found = of_rates(KEYS, rates, WINDOW.step_s * S)

    assert found.span_ns == MINUTES * 60 * S
    np.testing.assert_allclose(found.counts.sum(axis=1), rates.sum(axis=1) * 60, atol=1)


@pytest.mark.parametrize(
    ("key", "asked", "per_minute"),
    [
        ("team-a/old", Asked(), 24),
        ("team-a/own", Asked(), 18),
        ("any/twin", Asked(), 6),
        ("team-a/vision", Asked("knative"), 18),
        ("team-a/vision", Asked(rate='sum by (service) (label_replace(rate(kn_serving_invocation_duration_seconds_count'
         '{k8s_namespace_name="team-a"}[$window]), "service", "vision", "", ""))'), 18),
    ],
    ids=["Knative before OpenTelemetry", "Sluice's own predictor", "KServe's server, without a namespace", "a named source", "a query"],
)  # fmt: skip
def test_every_source_is_understood(server: Prometheus, key: str, asked: Asked, per_minute: float) -> None:
    assert metrics.rates(server, [key], WINDOW, asked).per_s[0, -5:] * 60 == pytest.approx(per_minute, rel=0.01)


def test_a_long_range_is_asked_in_parts(server: Prometheus, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = metrics.rates(server, KEYS, WINDOW, Asked()).per_s
    monkeypatch.setattr(api, "MOST_POINTS", 7)
    np.testing.assert_array_equal(metrics.rates(server, KEYS, WINDOW, Asked()).per_s, whole)


def test_more_points_than_a_server_gives_at_once_are_no_error(server: Prometheus) -> None:
    # 11,000 is the server's limit; a second a step makes 11,400.
    found = server.query_range("vector(1)", Window(BEGIN + 11_400, 1, 11_400))
    assert [series.floats.sum() for series in found] == [11_400]


def test_latencies_of_steps_without_requests_are_left_out(server: Prometheus) -> None:
    found = metrics.latencies(server, KEYS, WINDOW, Asked(), "knative")

    assert sorted(found) == ["team-a/vision", "team-b/text"]
    np.testing.assert_allclose(found["team-a/vision"], 40, rtol=0.2)
    assert np.median(found["team-a/vision"]) == pytest.approx(40, rel=0.01)
    np.testing.assert_allclose(found["team-b/text"], 200, rtol=0.01)
    assert len(found["team-b/text"]) < MINUTES


def test_latencies_in_milliseconds_are_understood(server: Prometheus) -> None:
    found = metrics.latencies(server, ["team-a/old"], WINDOW, Asked(), "knative-opencensus")
    np.testing.assert_allclose(found["team-a/old"], 55, rtol=0.01)


def test_gpus_count_while_their_pods_run(server: Prometheus) -> None:
    found = metrics.gpus(server, [*KEYS, "team-a/vision-predictor"], WINDOW)

    assert list(found) == ["team-a/vision"]
    assert (found["team-a/vision"].max(), found["team-a/vision"][-1]) == (2, 1)


def test_functions_that_nobody_knows_are_named_with_those_that_are_known(server: Prometheus) -> None:
    with pytest.raises(NotFound, match=r"team-x/nobody.*kn_serving_invocation_duration_seconds_count.*series of others.*vision-predictor"):
        metrics.rates(server, ["team-x/nobody"], WINDOW, Asked())


def test_a_name_in_two_namespaces_needs_the_namespace(server: Prometheus) -> None:
    with pytest.raises(InvalidValue, match=r"twin.*a/twin or b/twin"):
        metrics.rates(server, ["a/twin", "b/twin"], WINDOW, Asked("kserve"))


def test_a_wrong_query_is_named_with_what_the_server_says(server: Prometheus) -> None:
    with pytest.raises(InvalidValue, match=r"400 to the query 'sum\(': bad_data: .*parse error"):
        metrics.rates(server, KEYS, WINDOW, Asked(rate="sum("))


def test_a_rate_below_0_is_no_rate(server: Prometheus) -> None:
    with pytest.raises(InvalidValue, match=r"rate below 0"):
        metrics.rates(server, ["default/a"], WINDOW, Asked(rate='label_replace(vector(-1), "service", "a", "", "")'))


class Told(ThreadingHTTPServer):
    """Answers every request with one status, body and Location, and keeps what it was asked."""

    def __init__(self, status: int, body: bytes, location: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.told = status, body, location
        self.seen: list[tuple[str, str, str | None]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Told

    def do_GET(self) -> None:
        status, body, location = self.server.told
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization")))
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def told(status: int, body: bytes, location: str = "", tls: ssl.SSLContext | None = None) -> Iterator[Told]:
    with Told(status, body, location) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


EMPTY = b'{"status": "success", "data": {"resultType": "matrix", "result": []}}'


@pytest.mark.parametrize(
    ("status", "body", "error", "named"),
    [
        (401, b"no", Unavailable, "401 .*--token-file"),
        (403, b"no", Unavailable, "403 .*--token-file"),
        (404, b"<html>nothing here</html>", Unavailable, "404 .*nothing here"),
        (422, b'{"status": "error", "errorType": "execution", "error": "too many samples"}', InvalidValue, "422 .*execution: too many samples"),
        (503, b'{"status": "error", "errorType": "timeout", "error": "too slow"}', Unavailable, "503 .*timeout: too slow"),
        (200, b"<html>", InvalidValue, "does not answer as a Prometheus"),
        (200, b'{"status": "error", "errorType": "odd", "error": "odd"}', InvalidValue, "refused .*odd"),
        (200, b'{"status": "success", "data": {"resultType": "vector", "result": []}}', InvalidValue, "without a matrix"),
        (200, EMPTY.replace(b"[]", b"[7]"), InvalidValue, "does not answer as a Prometheus"),
        (200, EMPTY.replace(b"[]", b'[{"metric": {}, "values": [[7, "1"]]}]'), InvalidValue, "moments or values"),
    ],
)
def test_what_is_wrong_names_the_query(status: int, body: bytes, error: type[SluiceError], named: str) -> None:
    with told(status, body) as server, pytest.raises(error, match=named) as raised:
        Prometheus(f"http://127.0.0.1:{server.server_port}").query_range("up{x='1'}", WINDOW)
    assert "up{x='1'}" in raised.value.message


def test_a_server_that_is_not_there_is_named() -> None:
    with told(200, b"") as server:
        url = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(Unavailable, match=f"{url} cannot be asked .*refused.*'up'"):
        Prometheus(url).query_range("up", WINDOW)


def test_only_reads_with_the_token_under_the_path(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret-1\n")
    with told(200, EMPTY) as server:
        found = Prometheus(f"http://127.0.0.1:{server.server_port}/select/0/prometheus/", tmp_path / "token").query_range("up", WINDOW)
    assert found == []
    ((method, path, authorization),) = server.seen
    assert (method, authorization) == ("GET", "Bearer secret-1")
    assert path.startswith("/select/0/prometheus/api/v1/query_range?query=up&")


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret-1")
    with told(200, EMPTY) as other, told(302, b"", f"http://127.0.0.1:{other.server_port}/login") as server:
        with pytest.raises(Unavailable, match=f"302 .*{other.server_port}/login"):
            Prometheus(f"http://127.0.0.1:{server.server_port}", tmp_path / "token").query_range("up", WINDOW)
        assert other.seen == []


@pytest.mark.parametrize("url", ["127.0.0.1:9090", "ftp://host", "http://", "http://user:password@host", "http://host?query=up"])
def test_an_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidValue, match="--prometheus") as raised:
        Prometheus(url)
    assert "password" not in raised.value.message


@pytest.mark.parametrize("content", ["", "two\nlines", "h\u00e9"])
def test_a_token_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(content, "utf-8")
    with pytest.raises(InvalidValue, match="--token-file"):
        Prometheus("http://host", tmp_path / "token")


def test_https_is_trusted_by_its_own_certificates_alone(tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with told(200, EMPTY, tls=tls) as server:
        url = f"https://127.0.0.1:{server.server_port}"
        assert Prometheus(url, ca_file=certificate).query_range("up", WINDOW) == []
        with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
            Prometheus(url).query_range("up", WINDOW)


def test_a_file_without_certificates_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("none")
    with pytest.raises(InvalidValue, match="--ca-file"):
        Prometheus("https://host", ca_file=tmp_path / "ca")


def self_signed(folder: Path) -> Path:
    """Key and certificate of 127.0.0.1 in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    path = folder / "server.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM))
    return path
