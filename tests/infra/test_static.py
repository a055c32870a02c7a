"""What needs a container engine or a cluster is checked against its schema, linter or renderer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

from infra.screenshots import report_page
from infra.services import buckets
from infra.settings import StackError

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
BIN = Path(sys.executable).parent
MANIFESTS = sorted(
    f for f in (INFRA / "kubernetes").glob("*.yaml") if f.name != "kustomization.yaml"
)


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=ROOT, check=False, **options
    )


def passes(*command: str | Path) -> None:
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_file_matches_its_schema() -> None:
    passes(
        BIN / "check-jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        INFRA / "compose.yaml",
    )


def test_compose_services_are_hardened_and_publish_on_loopback() -> None:
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    assert {"postgres", "s3", "mlflow", "prefect", "worker", "gpu-worker"} <= set(services)
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        for port in service.get("ports", []):
            assert port.startswith("${BIND_ADDRESS:-127.0.0.1}:"), name
    for name in ("mlflow", "prefect", "worker", "gpu-worker"):
        environment = services[name]["environment"]
        assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert "basic-auth" in " ".join(services["mlflow"]["command"])
    assert "PREFECT_SERVER_API_AUTH_STRING" in services["prefect"]["environment"]


def test_every_compose_variable_is_in_the_example() -> None:
    text = (INFRA / "compose.yaml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    lines = (INFRA / ".env.example").read_text().splitlines()
    given = {line.split("=")[0] for line in lines if "=" in line and not line.startswith("#")}
    assert used == given
    for line in lines:
        name, _, value = line.partition("=")
        if any(word in name for word in ("PASSWORD", "SECRET", "KEY", "AUTH")):
            assert not value, f"{name} must stay empty in the example"


def test_the_s3_service_may_write_where_it_writes() -> None:
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    init, s3 = services["s3-init"], services["s3"]
    assert init["command"] == ["chown", s3["user"], "/data"]
    assert init["volumes"] == s3["volumes"] == ["s3:/data"]
    assert (init["user"], init["cap_add"]) == ("0:0", ["CHOWN"])
    assert s3["depends_on"]["s3-init"]["condition"] == "service_completed_successfully"
    for name in ("HOME", "MC_CONFIG_DIR"):
        assert Path("/tmp") in (Path(s3["environment"][name]), Path(s3["environment"][name]).parent)
    assert "/tmp" in s3["tmpfs"]


def test_runs_of_a_worker_get_all_settings_and_a_folder_on_a_volume() -> None:
    text = (INFRA / "compose.yaml").read_text()
    for name in ("worker", "gpu-worker"):
        service = yaml.safe_load(text)["services"][name]
        environment = service["environment"]
        assert {
            "MLFLOW_TRACKING_URI",
            "RFDETR_DVC_CACHE",
            "RFDETR_DVC_REMOTE",
            "RFDETR_NOTIFY_BLOCK",
            "RFDETR_NOTIFY_URL",
            "RFDETR_RECENT_IMAGES",
            "RFDETR_STATE_DIR",
            "RFDETR_STATE_URL",
        } <= set(environment)
        volumes = [Path(v.partition(":")[2]) for v in service["volumes"]]
        for folder in ("TMPDIR", "RFDETR_DVC_CACHE", "RFDETR_STATE_DIR"):
            assert set(volumes) & set(Path(environment[folder]).parents), folder
        assert environment["RFDETR_DVC_REMOTE"].split("/")[2] in buckets()


def test_every_documented_compose_command_starts_a_worker() -> None:
    files = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), INFRA / "compose.yaml")
    lines = [line for file in files for line in file.read_text().splitlines()]
    ups = [line for line in lines if "docker compose" in line and " up " in line]
    assert len(ups) >= 2
    assert all(re.search(r"--profile (cpu|gpu) up ", line) for line in ups)


def test_images_pass_hadolint() -> None:
    passes(BIN / "hadolint", *sorted((INFRA / "docker").glob("*.Dockerfile")))


def test_images_run_without_root_and_report_health() -> None:
    for file in (INFRA / "docker").glob("*.Dockerfile"):
        text = file.read_text()
        assert "\nUSER 10001:10001\n" in text
        assert "\nHEALTHCHECK " in text
        assert all(":latest" not in line for line in text.splitlines() if line.startswith("FROM"))


def test_the_image_installs_what_the_tests_ran_with_and_no_test_tools() -> None:
    root = INFRA.parent
    tested = set((root / "requirements.lock").read_text().splitlines())
    shipped = set((root / "requirements-runtime.lock").read_text().splitlines())
    assert shipped < tested
    names = {line.split("==")[0] for line in shipped}
    assert {"prefect", "mlflow", "dvc", "boto3", "timm", "onnxruntime"} <= names
    assert "prefect-kubernetes" in names
    assert not {"pytest", "mypy", "ruff", "moto", "hypothesis"} & names


def test_yaml_files_are_tidy() -> None:
    passes(BIN / "yamllint", "-c", ".yamllint.yaml", "infra", "prefect.yaml", "dvc.yaml")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda f: f.name)
def test_manifest_is_valid_kubernetes(manifest: Path) -> None:
    passes(BIN / "kubernetes-validate", "--strict", manifest)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kustomization_renders() -> None:
    done = run("kubectl", "kustomize", INFRA / "kubernetes")
    assert done.returncode == 0, done.stderr
    kinds = [item["kind"] for item in yaml.safe_load_all(done.stdout)]
    assert kinds.count("ServiceAccount") == 2
    assert "Deployment" in kinds
    assert "Secret" not in kinds


@pytest.mark.skipif(not shutil.which("terraform"), reason="terraform is not installed")
def test_terraform_is_formatted() -> None:
    passes("terraform", f"-chdir={INFRA / 'terraform'}", "fmt", "-check", "-recursive", "-diff")


def test_terraform_files_parse() -> None:
    import hcl2

    names: set[str] = set()
    for file in (INFRA / "terraform").glob("*.tf"):
        with open(file) as stream:
            parsed = hcl2.load(stream)
        for block in parsed.get("resource", []):
            names |= {key.strip('"') for key in block}
    assert {"aws_s3_bucket", "aws_iam_role", "aws_s3_bucket_public_access_block"} <= names


RENDER = """
import asyncio, json, sys, uuid
from prefect.client.schemas.objects import Flow, FlowRun
from prefect.client.orchestration import PrefectClient
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration as Configuration
template = json.loads(sys.stdin.read())
configuration = asyncio.run(Configuration.from_template_and_values(
    template, {"gpus": 2, "env": {"RFDETR_STATE_DIR": "/state"}},
    client=PrefectClient("http://127.0.0.1:1/api")))
run = FlowRun(id=uuid.UUID(int=7), name="night", flow_id=uuid.UUID(int=8))
configuration.prepare_for_flow_run(run, flow=Flow(id=uuid.UUID(int=8), name="retrain"))
manifest = dict(configuration.job_manifest)
manifest["metadata"] = {**manifest["metadata"], "name": "night"}
manifest["metadata"].pop("generateName", None)
print(json.dumps(manifest))
"""


def test_job_template_renders_as_the_worker_would(tmp_path: Path) -> None:
    """Rendered without PREFECT_* settings, which would leak into the manifest."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    clean |= {"PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONWARNINGS": "ignore"}
    template = (INFRA / "kubernetes" / "prefect-job-template.json").read_text()
    done = run(sys.executable, "-c", RENDER, input=template, env=clean)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads(done.stdout.splitlines()[-1])
    file = tmp_path / f"{uuid.uuid4().hex}.yaml"
    file.write_text(yaml.safe_dump(manifest))
    passes(BIN / "kubernetes-validate", "--strict", file)
    pod = manifest["spec"]["template"]["spec"]
    assert "completions" not in pod
    assert manifest["spec"]["parallelism"] == 1
    assert pod["terminationGracePeriodSeconds"] == 120
    container = pod["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert {"name": "RFDETR_STATE_DIR", "value": "/state"} in container["env"]
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    disks = {v["name"]: v.get("emptyDir", {}).get("sizeLimit") for v in pod["volumes"]}
    assert "/dev/shm" in mounts
    assert disks[mounts[container["workingDir"]]] == "200Gi"
    assert container["securityContext"]["readOnlyRootFilesystem"]


def test_the_kubernetes_worker_stays_in_its_namespace_and_hides_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prefect_kubernetes.settings import KubernetesSettings

    for document in yaml.safe_load_all((INFRA / "kubernetes" / "worker.yaml").read_text()):
        (container,) = document["spec"]["template"]["spec"]["containers"]
    for entry in container["env"]:
        if "_INTEGRATIONS_" in entry["name"]:
            monkeypatch.setenv(entry["name"], entry["value"])
    settings = KubernetesSettings()
    assert settings.observer.namespaces == {"rfdetr"}
    secret = yaml.safe_load((INFRA / "kubernetes" / "secret.example.yaml").read_text())
    assert settings.worker.api_auth_string_secret_name == secret["metadata"]["name"]
    assert settings.worker.api_auth_string_secret_key in secret["stringData"]
    assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
    image = (INFRA / "docker" / "pipeline.Dockerfile").read_text()
    for name in ("MLFLOW_TRACKING_URI", "RFDETR_DVC_REMOTE"):
        assert name in secret["stringData"]
    for name in ("RFDETR_DVC_CACHE", "RFDETR_STATE_DIR"):
        assert f"{name}=/" in image


def test_the_multi_node_job_is_what_the_fit_stage_expects() -> None:
    from flows.config.params import parse_params

    text = (INFRA / "kubernetes" / "multi-node-job.yaml").read_text()
    service, job = yaml.safe_load_all(text)
    told = re.search(r"^# +(runtime: .*)$", text, re.MULTILINE)
    assert told
    runtime = parse_params(yaml.safe_load(told[1]), origin="the header").runtime
    assert runtime.nodes == job["spec"]["completions"] == job["spec"]["parallelism"]
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    (port,) = service["spec"]["ports"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert runtime.rendezvous == f"{name}-0.{pod['subdomain']}:{port['port']}"
    assert service["spec"]["selector"] == {"job-name": name}
    command = pod["containers"][0]["args"][0]
    assert '"$JOB_COMPLETION_INDEX" = 0 ]; then exec python -m flows.stages.fit; fi' in command
    assert command.endswith("exec python -m flows.stages.fit --join")


def test_a_screenshot_of_something_else_than_a_report_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(StackError, match="not a dataset report"):
        report_page(page)
    page.write_text("<title>404 Not Found</title>")
    with pytest.raises(StackError, match="not a dataset report"):
        report_page(page)
    page.write_text("<title>Dataset report: demo</title>")
    assert report_page(page).url == page.as_uri()
