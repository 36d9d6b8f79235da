{{/* What names begin with: the release's name, with the chart's where that does not say it yet. */}}
{{- define "balancer.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Names of what belongs to no namespace: unique by release, and releases in two namespaces may have the same name. */}}
{{- define "balancer.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "balancer.fullname" .) -}}
{{- end -}}

{{- define "balancer.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "balancer.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* What never changes: the DaemonSet finds its pods by it. */}}
{{- define "balancer.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "balancer.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "balancer.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: daemon
app.kubernetes.io/part-of: balancer
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "balancer.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (default $.Chart.AppVersion .tag) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What the container may do. */}}
{{- define "balancer.securityContext" -}}
privileged: {{ .Values.privileged }}
{{- if not .Values.privileged }}
{{- $narrow := .Values.unprivileged }}
# What each is for: docs/privileges.md.
capabilities:
  drop: [ALL]
  add: [BPF, DAC_READ_SEARCH, NET_ADMIN, PERFMON, SETPCAP, SYS_ADMIN, SYS_PTRACE]
seccompProfile:
  {{- toYaml $narrow.seccompProfile | nindent 2 }}
{{- with $narrow.seLinuxOptions }}
seLinuxOptions:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}
appArmorProfile:
  {{- toYaml $narrow.appArmorProfile | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{/* An AppArmor profile as annotations name it: Kubernetes before 1.30 has no field for it. */}}
{{- define "balancer.appArmorAnnotation" -}}
{{- if eq .type "Localhost" -}}
localhost/{{ .localhostProfile }}
{{- else -}}
{{ ternary "unconfined" "runtime/default" (eq .type "Unconfined") }}
{{- end -}}
{{- end -}}

{{/* One probe: when to ask, and `balancer ping`. */}}
{{- define "balancer.probe" -}}
exec:
  command: [balancer, ping]
{{ toYaml . }}
{{- end -}}

{{/* The daemon's file. */}}
{{- define "balancer.config" -}}
kubernetes:
  services:
    {{- toYaml .Values.config.services | nindent 4 }}
  publish_every: {{ .Values.config.publishEvery }}
  hold_for: {{ .Values.config.holdFor }}
fail_open_after: {{ .Values.config.failOpenAfter }}
{{- end -}}
