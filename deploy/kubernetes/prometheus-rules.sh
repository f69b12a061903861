#!/bin/sh
# Prints deploy/prometheus/rules.yml and alerts.yml as the resources that the Prometheus operator reads.
# A script, since kustomize reads no file from outside its folder and a copy would fall behind.
set -eu
cd "$(dirname "$0")/../prometheus"
for name in rules alerts; do
    cat <<RESOURCE
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: rdt-$name
  labels:
    app.kubernetes.io/name: rdt
spec:
RESOURCE
    sed 's/^\(..*\)$/  \1/' "$name.yml"
done
