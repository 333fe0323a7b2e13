// Checks the custom resources on standard input, a JSON list, by the definitions that their makers publish: a line for each
// that is wrong. They say nothing of fields that they don't know.
import { readFileSync } from "node:fs";
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject";
import { PodMonitor } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PodMonitor";

const kinds = { ScaledObject, PodMonitor };
for (const { apiVersion, kind, ...content } of JSON.parse(readFileSync(0))) {
  const checked = new kinds[kind](content);
  try {
    if (checked.apiVersion !== apiVersion) throw new Error(`apiVersion is ${apiVersion}`);
    checked.validate();
  } catch (error) {
    console.log(`${kind} ${content.metadata.name}: ${error.message}`);
    process.exitCode = 1;
  }
}
