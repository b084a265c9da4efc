"""What Kubernetes would refuse in a manifest: a table of the fields used here, read strictly.

The facts are those of the API references of Kubernetes 1.32, KubeRay 1.6 (ray.io/v1) and the
Prometheus operator, for the kinds and fields that our manifests have. A field that is not in the
table is a problem, be it misspelt or only new here: then it is looked up and added.
"""

import re
from collections.abc import Iterator
from typing import Any

KINDS = {
    ("v1", "ConfigMap"): "ConfigMap",
    ("v1", "PersistentVolumeClaim"): "PersistentVolumeClaim",
    ("v1", "Service"): "Service",
    ("apps/v1", "Deployment"): "Deployment",
    ("apps/v1", "StatefulSet"): "StatefulSet",
    ("networking.k8s.io/v1", "NetworkPolicy"): "NetworkPolicy",
    ("monitoring.coreos.com/v1", "PodMonitor"): "PodMonitor",
    ("ray.io/v1", "RayCluster"): "RayCluster",
    ("ray.io/v1", "RayJob"): "RayJob",
    ("ray.io/v1", "RayService"): "RayService",
}
"""apiVersion and kind -> the type of the object."""

TYPES = {
    # Ray
    "RayCluster": "metadata!:Meta spec!:RayClusterSpec",
    "RayClusterSpec": """
        rayVersion:string enableInTreeAutoscaling:boolean autoscalerOptions:AutoscalerOptions
        authOptions:AuthOptions gcsFaultToleranceOptions:GcsFaultToleranceOptions
        headGroupSpec!:HeadGroupSpec headServiceAnnotations:map suspend:boolean managedBy:string
        workerGroupSpecs:[WorkerGroupSpec]""",
    "AutoscalerOptions": """
        version:{v1|v2} idleTimeoutSeconds:integer upscalingMode:{Default|Aggressive|Conservative}
        resources:Resources env:[EnvVar] image:string securityContext:SecurityContext""",
    "AuthOptions": "mode:{disabled|token} secretName:string enableK8sTokenAuth:boolean",
    "GcsFaultToleranceOptions": """
        redisAddress:string redisUsername:RedisCredential redisPassword:RedisCredential
        externalStorageNamespace:string""",
    "RedisCredential": "value:string valueFrom:EnvVarSource",
    "HeadGroupSpec": """
        rayStartParams:map template!:PodTemplate serviceType:string enableIngress:boolean""",
    "WorkerGroupSpec": """
        groupName!:string replicas:integer minReplicas:integer maxReplicas:integer
        idleTimeoutSeconds:integer numOfHosts:integer rayStartParams:map template!:PodTemplate""",
    "RayJob": "metadata!:Meta spec!:RayJobSpec",
    "RayJobSpec": """
        entrypoint:string clusterSelector:map rayClusterSpec:RayClusterSpec runtimeEnvYAML:string
        submissionMode:{K8sJobMode|HTTPMode|InteractiveMode|SidecarMode} backoffLimit:integer
        activeDeadlineSeconds:integer shutdownAfterJobFinishes:boolean suspend:boolean
        ttlSecondsAfterFinished:integer entrypointNumCpus:number entrypointNumGpus:number
        metadata:map jobId:string submitterPodTemplate:PodTemplate""",
    "RayService": "metadata!:Meta spec!:RayServiceSpec",
    "RayServiceSpec": """
        serveConfigV2:string rayClusterConfig!:RayClusterSpec serveService:Service
        upgradeStrategy:RayServiceUpgradeStrategy excludeHeadPodFromServeSvc:boolean""",
    "RayServiceUpgradeStrategy": "type:{NewCluster|NewClusterWithIncrementalUpgrade|None}",
    # Prometheus
    "PodMonitor": "metadata!:Meta spec!:PodMonitorSpec",
    "PodMonitorSpec": """
        jobLabel:string selector!:LabelSelector podMetricsEndpoints!:[PodMetricsEndpoint]""",
    "PodMetricsEndpoint": """
        port:string interval:string path:string scheme:string relabelings:[Relabeling]""",
    "Relabeling": """
        sourceLabels:[string] targetLabel:string regex:string replacement:string action:string""",
    # Kubernetes
    "Meta": """
        name:string generateName:string namespace:string labels:map annotations:map""",
    "LabelSelector": "matchLabels:map matchExpressions:[LabelExpression]",
    "LabelExpression": "key!:string operator!:{In|NotIn|Exists|DoesNotExist} values:[string]",
    "ConfigMap": "metadata!:Meta data:map",
    "PersistentVolumeClaim": "metadata!:Meta spec!:ClaimSpec",
    "ClaimSpec": """
        accessModes!:[{ReadWriteOnce|ReadOnlyMany|ReadWriteMany|ReadWriteOncePod}]
        storageClassName:string resources!:Resources""",
    "Service": "metadata!:Meta spec!:ServiceSpec",
    "ServiceSpec": "selector!:map ports!:[ServicePort] type:string clusterIP:string",
    "ServicePort": "name:string port!:integer targetPort:port protocol:{TCP|UDP}",
    "Deployment": "metadata!:Meta spec!:DeploymentSpec",
    "DeploymentSpec": "replicas:integer selector!:LabelSelector template!:PodTemplate",
    "StatefulSet": "metadata!:Meta spec!:StatefulSetSpec",
    "StatefulSetSpec": """
        replicas:integer selector!:LabelSelector serviceName!:string template!:PodTemplate
        volumeClaimTemplates:[PersistentVolumeClaim]""",
    "NetworkPolicy": "metadata!:Meta spec!:NetworkPolicySpec",
    "NetworkPolicySpec": """
        podSelector!:LabelSelector policyTypes:[{Ingress|Egress}] ingress:[IngressRule]""",
    "IngressRule": "from:[Peer] ports:[PolicyPort]",
    "Peer": "podSelector:LabelSelector namespaceSelector:LabelSelector",
    "PolicyPort": "protocol:{TCP|UDP} port:port",
    "PodTemplate": "metadata:Meta spec!:PodSpec",
    "PodSpec": """
        containers!:[Container] initContainers:[Container] volumes:[Volume] nodeSelector:map
        tolerations:[Toleration] affinity:Affinity securityContext:PodSecurityContext
        terminationGracePeriodSeconds:integer automountServiceAccountToken:boolean
        serviceAccountName:string priorityClassName:string hostNetwork:boolean
        restartPolicy:{Always|OnFailure|Never}""",
    "PodSecurityContext": """
        runAsNonRoot:boolean runAsUser:integer runAsGroup:integer fsGroup:integer
        fsGroupChangePolicy:{OnRootMismatch|Always} seccompProfile:SeccompProfile""",
    "SeccompProfile": "type!:{RuntimeDefault|Unconfined|Localhost}",
    "Toleration": """
        key:string operator:{Exists|Equal} value:string
        effect:{NoSchedule|PreferNoSchedule|NoExecute} tolerationSeconds:integer""",
    "Affinity": "podAntiAffinity:PodAntiAffinity",
    "PodAntiAffinity": "requiredDuringSchedulingIgnoredDuringExecution:[PodAffinityTerm]",
    "PodAffinityTerm": "labelSelector:LabelSelector topologyKey!:string",
    "Container": """
        name!:string image:string command:[string] args:[string] env:[EnvVar] ports:[ContainerPort]
        imagePullPolicy:{Always|IfNotPresent|Never} resources:Resources workingDir:string
        readinessProbe:Probe livenessProbe:Probe startupProbe:Probe
        securityContext:SecurityContext volumeMounts:[VolumeMount]""",
    "ContainerPort": "name:string containerPort!:integer protocol:{TCP|UDP}",
    "EnvVar": "name!:string value:string valueFrom:EnvVarSource",
    "EnvVarSource": "secretKeyRef:KeySelector configMapKeyRef:KeySelector",
    "KeySelector": "name!:string key!:string optional:boolean",
    "Resources": "requests:quantities limits:quantities",
    "Probe": """
        httpGet:HTTPGet exec:Exec periodSeconds:integer timeoutSeconds:integer
        failureThreshold:integer initialDelaySeconds:integer""",
    "HTTPGet": "path:string port!:port scheme:string",
    "Exec": "command!:[string]",
    "SecurityContext": """
        allowPrivilegeEscalation:boolean capabilities:Capabilities privileged:boolean
        readOnlyRootFilesystem:boolean""",
    "Capabilities": "add:[string] drop:[string]",
    "VolumeMount": "name!:string mountPath!:string readOnly:boolean subPath:string",
    "Volume": """
        name!:string persistentVolumeClaim:ClaimSource emptyDir:EmptyDir secret:SecretSource
        configMap:ConfigMapSource hostPath:HostPath""",
    "ClaimSource": "claimName!:string readOnly:boolean",
    "EmptyDir": "medium:{Memory} sizeLimit:quantity",
    "SecretSource": "secretName!:string optional:boolean defaultMode:integer",
    "ConfigMapSource": "name!:string",
    "HostPath": "path!:string type:string",
}
"""Type -> its fields as `name:type`; `!` marks what has to be there, `[]` a list, `{}` a choice,
`map` an object of texts, and `port` a number or the name of one."""

QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
LABEL = re.compile(r"(([A-Za-z0-9][\w.-]{0,61})?[A-Za-z0-9])?")
PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with an object, each with its path; none for one that would be taken."""
    kind = KINDS.get((document.get("apiVersion"), document.get("kind")))
    if kind is None:
        return [f"no {document.get('kind')} in {document.get('apiVersion')}"]
    body = {key: value for key, value in document.items() if key not in ("apiVersion", "kind")}
    return list(_check(body, kind, document["kind"]))


def _check(value: Any, kind: str, path: str) -> Iterator[str]:
    if kind in TYPES:
        yield from _check_object(value, kind, path)
    elif kind.startswith("["):
        if not isinstance(value, list):
            yield f"{path}: not a list"
            return
        for number, one in enumerate(value):
            yield from _check(one, kind[1:-1], f"{path}[{number}]")
    elif kind.startswith("{"):
        if value not in kind[1:-1].split("|"):
            yield f"{path}: {value!r} is none of {kind[1:-1]}"
    elif not _is(value, kind):
        yield f"{path}: {value!r} is no {kind}"


def _check_object(value: Any, kind: str, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: not an object"
        return
    fields = dict(field.split(":", 1) for field in TYPES[kind].split())
    needed = {name[:-1] for name in fields if name.endswith("!")}
    fields = {name.rstrip("!"): own for name, own in fields.items()}
    yield from (f"{path}.{name}: missing" for name in sorted(needed - value.keys()))
    for name, own in value.items():
        if name not in fields:
            yield f"{path}.{name}: unknown field of {kind}"
        else:
            yield from _check(own, fields[name], f"{path}.{name}")
    if kind == "Meta":
        yield from _check_meta(value, path)
    if kind in ("ContainerPort", "ServicePort") and not PORT_NAME.fullmatch(value.get("name", "a")):
        yield f"{path}.name: {value['name']!r} is no name of a port"


def _check_meta(meta: dict[str, Any], path: str) -> Iterator[str]:
    name = meta.get("name", meta.get("generateName", "a").rstrip("-"))
    if not NAME.fullmatch(str(name)):
        yield f"{path}.name: {name!r}"
    for key, label in (meta.get("labels") or {}).items():
        if not LABEL.fullmatch(str(label)):
            yield f"{path}.labels.{key}: {label!r}"


def _is(value: Any, kind: str) -> bool:
    if kind == "map":
        return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
    if kind == "quantities":
        return isinstance(value, dict) and all(_is(one, "quantity") for one in value.values())
    if kind == "quantity":
        return not isinstance(value, bool) and bool(QUANTITY.fullmatch(str(value)))
    if kind == "port":
        return _is(value, "integer") or (
            isinstance(value, str) and bool(PORT_NAME.fullmatch(value))
        )
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "string":
        return isinstance(value, str)
    raise ValueError(f"the table has no type {kind}")
