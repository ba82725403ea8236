{{- define "scalekd-cache.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "scalekd-cache.name" .) .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name (include "scalekd-cache.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "scalekd-cache.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "scalekd-cache.selector" -}}
app.kubernetes.io/name: {{ include "scalekd-cache.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "scalekd-cache.metadata" -}}
name: {{ include "scalekd-cache.fullname" . }}
labels:
  {{- include "scalekd-cache.labels" . | nindent 2 }}
{{- end }}

{{- define "scalekd-cache.labels" -}}
{{ include "scalekd-cache.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "scalekd-cache.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag }}{{ end }}
{{- end }}

{{- define "scalekd-cache.tokens" -}}
{{ .Values.tokens.existingSecret | default (printf "%s-tokens" (include "scalekd-cache.fullname" .)) }}
{{- end }}

{{- define "scalekd-cache.clients" -}}
{{ .Values.tokens.existingSecret | default (printf "%s-clients" (include "scalekd-cache.fullname" .)) }}
{{- end }}

{{- define "scalekd-cache.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (ternary (include "scalekd-cache.fullname" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- define "scalekd-cache.claim" -}}
{{ .Values.persistence.existingClaim | default (ternary (include "scalekd-cache.fullname" .) "" .Values.persistence.create) }}
{{- end }}
