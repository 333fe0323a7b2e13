{{- /* What pools are scaled by, as YAML: (dict "root" $ "component" "decode" "topology" ...). Metrics of cluster/metrics.py; a value
is per worker. */ -}}
{{- define "baton.signals" -}}
{{- $scaling := .root.Values.autoscaling -}}
{{- $prefills := or (eq .component "prefill") (eq (int .topology.prefillReplicas) 0) -}}
signals:
{{- if $prefills }}
  - metric: baton_waiting_tokens
    target: {{ mulf $scaling.prefill.ttftBudgetSeconds $scaling.prefill.tokensPerSecond | ceil | int | quote }}
{{- end }}
{{- if eq .component "decode" }}
  - metric: baton_kv_committed_ratio
    target: {{ $scaling.decode.committedPages | toString | quote }}
{{- end }}
{{- end -}}

{{- define "baton.scalingBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - {type: Percent, value: 100, periodSeconds: 60}
    - {type: Pods, value: 1, periodSeconds: 60}
  selectPolicy: Max
scaleDown:
  stabilizationWindowSeconds: {{ int .Values.autoscaling.scaleDownSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: 60}
{{- end -}}
