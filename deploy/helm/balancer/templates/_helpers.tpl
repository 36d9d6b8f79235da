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
  add: {{ include "balancer.capabilities" . }}
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

{{/* What a service entry of the values may not say, each in one sentence. */}}
{{- define "balancer.checkEntry" -}}
{{- $at := printf "config.services.%s" .name -}}
{{- $entry := .entry -}}
{{- if not (kindIs "map" $entry) -}}
{{- fail (printf "%s has no keys; give one, for example %s.port=11800, or leave the entry out" $at $at) -}}
{{- end -}}
{{- range $key := list "selector" "namespace" -}}
{{- if and (hasKey $entry "service") (hasKey $entry $key) -}}
{{- fail (printf "%s: `%s` beside `service`, which names one Kubernetes Service; keep one of the two (%s.%s=null takes the other away)" $at $key $at $key) -}}
{{- end -}}
{{- end -}}
{{- if eq (toString $entry.keepalive) "true" -}}
{{- fail (printf "%s.keepalive: it is on where nothing is said; write `off`, or idle, interval and probes" $at) -}}
{{- end -}}
{{- end -}}

{{/* A quota as the file has it: with one rule. `observed`, which the chart gives, makes way for another. */}}
{{- define "balancer.quota" -}}
{{- $at := printf "config.services.%s.quota" .name -}}
{{- $quota := deepCopy .quota -}}
{{- $rules := list -}}
{{- range $rule := list "pods" "clients" "per_backend" -}}
{{- if hasKey $quota $rule -}}{{- $rules = append $rules $rule -}}{{- end -}}
{{- end -}}
{{- if gt (len $rules) 1 -}}
{{- fail (printf "%s: `%s` beside `%s`, and a quota has one rule; keep one of the two" $at (index $rules 0) (index $rules 1)) -}}
{{- end -}}
{{- if $rules -}}
{{- $quota = omit $quota "observed" -}}
{{- else if not (hasKey $quota "observed") -}}
{{- fail (printf "%s has no rule; give one of observed (10m), pods, clients (300) and per_backend (500), or take the quota away (%s=null)" $at $at) -}}
{{- end -}}
{{- if has "per_backend" $rules -}}
{{- $quota = omit $quota "headroom" "min_quota" -}}
{{- end -}}
{{- if and (hasKey $quota "connections_per_client") (not (has "clients" $rules)) -}}
{{- fail (printf "%s: `connections_per_client` goes with `clients`" $at) -}}
{{- end -}}
{{- toYaml $quota -}}
{{- end -}}

{{/* The daemon's file. */}}
{{- define "balancer.config" -}}
{{- if not (kindIs "map" .Values.config.services) -}}
{{- fail "config.services is no list: it has its entries by their names, as in config.services.agents.port=11800, or `services: {agents: {port: 11800}}` in a file" -}}
{{- end -}}
mode: {{ include "balancer.mode" . }}
kubernetes:
  services:
    {{- range $name, $entry := .Values.config.services }}
    {{- include "balancer.checkEntry" (dict "name" $name "entry" $entry) }}
    - name: {{ $name }}
      {{- with omit $entry "quota" }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      {{- if hasKey $entry "quota" }}
      quota:
        {{- include "balancer.quota" (dict "name" $name "quota" $entry.quota) | nindent 8 }}
      {{- end }}
    {{- end }}
  publish_every: {{ .Values.config.publishEvery }}
  hold_for: {{ .Values.config.holdFor }}
  place: {{ ternary "on" "off" (has (toString .Values.config.place) (list "on" "true")) }}
fail_open_after: {{ .Values.config.failOpenAfter }}
{{- end -}}

{{/* YAML makes a boolean of `on`. */}}
{{- define "balancer.mode" -}}
{{- ternary "on" (toString .Values.config.mode) (eq (toString .Values.config.mode) "true") -}}
{{- end -}}

{{/* SecurityContextConstraints belong to no namespace, and take no colon. */}}
{{- define "balancer.constraints" -}}
{{- printf "%s.%s" .Release.Namespace (include "balancer.fullname" .) -}}
{{- end -}}

{{/* Capabilities of a container that is not privileged. What each is for: docs/privileges.md. */}}
{{- define "balancer.capabilities" -}}
[BPF, DAC_READ_SEARCH, NET_ADMIN, PERFMON, SETPCAP, SYS_ADMIN, SYS_PTRACE]
{{- end -}}

{{/* How mounts of the node's BPF file system come into the container. */}}
{{- define "balancer.mountPropagation" -}}
{{- $how := .Values.bpffs.mountPropagation -}}
{{- if and (eq $how "Bidirectional") (not .Values.privileged) -}}
{{- fail "bpffs.mountPropagation is Bidirectional, which Kubernetes allows to privileged containers alone: set privileged=true, or mount the BPF file system on the nodes (mount -t bpf bpf /sys/fs/bpf)" -}}
{{- end -}}
{{- $how -}}
{{- end -}}
