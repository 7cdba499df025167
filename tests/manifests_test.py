"""deploy/k8s renders, passes Kubernetes' own schema, and its numbers agree with each other."""

import pathlib
import re
import shutil
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
K8S = ROOT / "deploy/k8s"
FOLDERS = ["base", "overlays/gpu"]
WATCHDOG_SECONDS = 5  # what the server adds to its own drain before it ends itself
SCHEMA = "1.30"


def render(folder):
    beside_python = pathlib.Path(sys.executable).parent / "kubectl"
    kubectl = str(beside_python) if beside_python.exists() else shutil.which("kubectl")
    assert kubectl, "expected kubectl in the virtual environment or on the PATH, found neither"
    done = subprocess.run([kubectl, "kustomize", str(K8S / folder)], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module", params=FOLDERS)
def objects(request):
    return render(request.param)


def of_kind(objects, kind):
    return [thing for thing in objects if thing["kind"] == kind]


@pytest.fixture
def pod(objects):
    (deployment,) = of_kind(objects, "Deployment")
    return deployment["spec"]["template"]


@pytest.fixture
def container(pod):
    (only,) = pod["spec"]["containers"]
    return only


@pytest.fixture
def env(container):
    return {entry["name"]: entry.get("value") for entry in container["env"]}


def test_every_object_passes_the_schema(objects):
    kinds = [thing["kind"] for thing in objects]
    assert sorted(kinds) == ["Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service",
                             "Service"]
    for thing in objects:
        kubernetes_validate.validate(thing, SCHEMA, strict=True)


def test_the_schema_check_sees_a_misspelt_field(objects):
    (deployment,) = of_kind(objects, "Deployment")
    broken = {**deployment, "spec": {**deployment["spec"], "replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, SCHEMA, strict=True)


def test_selectors_find_the_pods(objects, pod):
    labels = pod["metadata"]["labels"]
    (deployment,), (policy,) = of_kind(objects, "Deployment"), of_kind(objects, "NetworkPolicy")
    (budget,) = of_kind(objects, "PodDisruptionBudget")
    selectors = [deployment["spec"]["selector"]["matchLabels"],
                 policy["spec"]["podSelector"]["matchLabels"],
                 budget["spec"]["selector"]["matchLabels"]]
    selectors += [service["spec"]["selector"] for service in of_kind(objects, "Service")]
    for selector in selectors:
        assert selector and selector.items() <= labels.items()


def test_the_grace_period_covers_the_whole_drain(pod, env):
    drain = float(env["GLA_SHUTDOWN_DELAY"]) + float(env["GLA_SHUTDOWN_TIMEOUT"])
    assert pod["spec"]["terminationGracePeriodSeconds"] >= drain + WATCHDOG_SECONDS + 5


def test_readiness_is_noticed_within_the_shutdown_delay(container, env):
    probe = container["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] <= float(env["GLA_SHUTDOWN_DELAY"])


def test_probes_ask_the_http_port(container):
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": 8001, "http": 8002}
    paths = {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    for probe, path in paths.items():
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}


def test_scrape_annotations_name_the_http_port(pod):
    notes = pod["metadata"]["annotations"]
    assert (notes["prometheus.io/port"], notes["prometheus.io/path"]) == ("8002", "/metrics")


def test_every_variable_is_the_twin_of_a_flag(env):
    flags = re.findall(r'^\s*\{"([a-z-]+)",', (ROOT / "server/config.cc").read_text(), re.M)
    twins = {"GLA_" + flag.upper().replace("-", "_") for flag in flags}
    assert {"GLA_MODEL", "GLA_SHUTDOWN_DELAY"} <= twins
    assert set(env) <= twins


def test_pods_are_restricted(pod, container):
    spec, context = pod["spec"], container["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] >= 10000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    assert spec["automountServiceAccountToken"] is False
    # a Service named "gla" would otherwise set GLA_PORT, which the server reads as its own flag
    assert spec["enableServiceLinks"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)


def test_pods_are_guaranteed_their_resources(container):
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]


def test_the_policy_lets_in_grpc_and_metrics_and_nothing_out(objects):
    (policy,) = of_kind(objects, "NetworkPolicy")
    ports = [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
    assert sorted(ports) == [8001, 8002]
    assert sorted(policy["spec"]["policyTypes"]) == ["Egress", "Ingress"]
    assert not policy["spec"].get("egress")


def test_the_gpu_overlay_asks_for_one_gpu_and_the_cuda_image():
    (deployment,) = of_kind(render("overlays/gpu"), "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"] == "gla-server:cuda"
    assert any(entry["key"] == "nvidia.com/gpu" for entry in spec["tolerations"])


def test_the_base_uses_the_cpu_image():
    (deployment,) = of_kind(render("base"), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "gla-server:cpu"
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_image_and_manifests_agree_on_user_and_ports(container, pod):
    dockerfile = (ROOT / "Dockerfile").read_text()
    context = pod["spec"]["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile
    ports = " ".join(str(port["containerPort"]) for port in container["ports"])
    assert f"EXPOSE {ports}\n" in dockerfile


@pytest.mark.parametrize("name", ["prometheus.yml", "kubernetes.yml"])
def test_scrape_configurations(name):
    config = yaml.safe_load((ROOT / "deploy/prometheus" / name).read_text())
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "gla-server"
    assert not {"metrics_path", "scheme"} & set(job)  # /metrics over HTTP is both sides' default


def test_the_pod_scrape_finds_the_pods_of_the_base(pod, container):
    config = yaml.safe_load((ROOT / "deploy/prometheus/kubernetes.yml").read_text())
    rules = config["scrape_configs"][0]["relabel_configs"]
    kept = {rule["source_labels"][0]: rule["regex"] for rule in rules if rule.get("action") == "keep"}
    name = kept["__meta_kubernetes_pod_label_app_kubernetes_io_name"]
    assert name == pod["metadata"]["labels"]["app.kubernetes.io/name"]
    port = kept["__meta_kubernetes_pod_container_port_name"]
    assert {"name": port, "containerPort": 8002} in container["ports"]
