//! Every metric of the node: names, labels, buckets. Names follow OpenTelemetry's GenAI conventions
//! (semantic conventions 1.37, in Prometheus spelling) where one exists, `grapevine_` elsewhere.
//!
//! One recorder belongs to one node, so that several nodes in one process do not mix. Labels come
//! from closed sets (models of the registry, endpoints, codes): a client cannot make new series.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use protocol::api::ErrorCode;

/// What a request wants, as the label `gen_ai_operation_name`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Chat,
    TextCompletion,
    Embeddings,
    /// Everything that does not run a model.
    Other,
}

impl Operation {
    /// The label's value; names of the conventions.
    pub const fn as_str(self) -> &'static str {
        match self {
            Operation::Chat => "chat",
            Operation::TextCompletion => "text_completion",
            Operation::Embeddings => "embeddings",
            Operation::Other => "other",
        }
    }

    /// The operation that a path stands for.
    pub fn of_path(path: &str) -> Operation {
        match path {
            "/v1/chat/completions" => Operation::Chat,
            "/v1/completions" => Operation::TextCompletion,
            "/v1/embeddings" => Operation::Embeddings,
            _ => Operation::Other,
        }
    }
}

/// The recorder of a node.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
}

impl Metrics {
    pub fn new() -> Result<Metrics, BuildError> {
        let mut builder = PrometheusBuilder::new();
        for (name, buckets) in BUCKETS {
            builder = builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), buckets)?;
        }
        let recorder = builder.build_recorder();
        for (name, help) in HELP {
            // The exporter keeps one help text for a name, whatever kind it was described as.
            recorder.describe_gauge(KeyName::from_const_str(name), None, (*help).into());
        }
        let handle = recorder.handle();
        Ok(Metrics { recorder, handle })
    }

    /// The text that Prometheus scrapes.
    pub fn render(&self) -> String {
        self.handle.run_upkeep();
        self.handle.render()
    }

    /// Counts a request that has been answered, or whose client left.
    pub fn count_request(
        &self,
        operation: Operation,
        model: Option<&str>,
        status: u16,
        code: Option<ErrorCode>,
        took: Duration,
    ) {
        let code = code.map_or("ok", ErrorCode::as_str);
        let model = model.unwrap_or("");
        self.counter(
            REQUESTS,
            &[
                (OPERATION, operation.as_str()),
                (MODEL, model),
                ("status", &status.to_string()),
                ("code", code),
            ],
        )
        .increment(1);
        if operation != Operation::Other {
            let labels = [(OPERATION, operation.as_str()), (MODEL, model), ("error_type", code)];
            self.histogram(REQUEST_DURATION, &labels).record(took.as_secs_f64());
        }
    }

    /// The handles of one model; made once, when it is loaded.
    pub fn model(&self, model: &str) -> ModelMetrics {
        let plain = [(MODEL, model)];
        let with = |key: &'static str, value: &'static str| [(MODEL, model), (key, value)];
        ModelMetrics {
            time_to_first_token: self.histogram(TIME_TO_FIRST_TOKEN, &plain),
            time_per_output_token: self.histogram(TIME_PER_OUTPUT_TOKEN, &plain),
            inter_token_latency: self.histogram(INTER_TOKEN_LATENCY, &plain),
            queue_time: self.histogram(QUEUE_TIME, &plain),
            input_tokens: self.histogram(TOKEN_USAGE, &with(TOKEN_TYPE, "input")),
            output_tokens: self.histogram(TOKEN_USAGE, &with(TOKEN_TYPE, "output")),
            cached_tokens: self.counter(CACHED_TOKENS, &plain),
            blocks_free: self.gauge(KV_BLOCKS, &with("state", "free")),
            blocks_used: self.gauge(KV_BLOCKS, &with("state", "used")),
            blocks_cached: self.gauge(KV_BLOCKS, &with("state", "cached")),
            running: self.gauge(SEQUENCES, &with("state", "running")),
            waiting: self.gauge(SEQUENCES, &with("state", "waiting")),
            preemptions: self.counter(PREEMPTIONS, &plain),
            step_time: self.histogram(STEP_TIME, &plain),
            step_tokens: self.counter(STEP_TOKENS, &plain),
            slow_clients: self.counter(SLOW_CLIENTS, &plain),
        }
    }

    fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        self.recorder.register_counter(&key(name, labels), &METADATA)
    }

    fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Gauge {
        self.recorder.register_gauge(&key(name, labels), &METADATA)
    }

    fn histogram(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Histogram {
        self.recorder.register_histogram(&key(name, labels), &METADATA)
    }
}

/// Handles of one model's metrics. Times are in seconds.
#[derive(Clone)]
pub struct ModelMetrics {
    /// Arrival of the request until its first token, queueing included.
    pub time_to_first_token: Histogram,
    /// (last token - first token) / (tokens - 1), once for each choice.
    pub time_per_output_token: Histogram,
    /// Each gap between two tokens of a choice.
    pub inter_token_latency: Histogram,
    /// Arrival until the first step that computes something for the request.
    pub queue_time: Histogram,
    pub input_tokens: Histogram,
    pub output_tokens: Histogram,
    /// Prompt tokens whose KV was in the prefix cache.
    pub cached_tokens: Counter,
    /// Blocks that hold nothing.
    pub blocks_free: Gauge,
    /// Blocks that a running sequence holds.
    pub blocks_used: Gauge,
    /// Blocks that hold a prefix nobody uses at present; given away when blocks run short.
    pub blocks_cached: Gauge,
    pub running: Gauge,
    pub waiting: Gauge,
    pub preemptions: Counter,
    pub step_time: Histogram,
    pub step_tokens: Counter,
    /// Streams given up because their client read too slowly.
    pub slow_clients: Counter,
}

fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
    let labels: Vec<Label> = labels.iter().map(|&(k, v)| Label::new(k, v.to_owned())).collect();
    Key::from_parts(name, labels)
}

static METADATA: Metadata<'static> = Metadata::new("node", Level::INFO, None);

const OPERATION: &str = "gen_ai_operation_name";
const MODEL: &str = "gen_ai_request_model";
const TOKEN_TYPE: &str = "gen_ai_token_type";

const TIME_TO_FIRST_TOKEN: &str = "gen_ai_server_time_to_first_token_seconds";
const TIME_PER_OUTPUT_TOKEN: &str = "gen_ai_server_time_per_output_token_seconds";
const REQUEST_DURATION: &str = "gen_ai_server_request_duration_seconds";
const TOKEN_USAGE: &str = "gen_ai_client_token_usage";
const INTER_TOKEN_LATENCY: &str = "grapevine_inter_token_latency_seconds";
const QUEUE_TIME: &str = "grapevine_queue_time_seconds";
const CACHED_TOKENS: &str = "grapevine_prefix_cache_hit_tokens_total";
const KV_BLOCKS: &str = "grapevine_kv_blocks";
const SEQUENCES: &str = "grapevine_sequences";
const PREEMPTIONS: &str = "grapevine_preemptions_total";
const STEP_TIME: &str = "grapevine_step_duration_seconds";
const STEP_TOKENS: &str = "grapevine_step_tokens_total";
const REQUESTS: &str = "grapevine_http_requests_total";
const SLOW_CLIENTS: &str = "grapevine_slow_clients_total";

const HELP: &[(&str, &str)] = &[
    (TIME_TO_FIRST_TOKEN, "arrival of a request until its first token, queueing included"),
    (TIME_PER_OUTPUT_TOKEN, "mean gap between the tokens of a choice"),
    (REQUEST_DURATION, "arrival of a request until the end of its answer"),
    (TOKEN_USAGE, "tokens of a request, by type: input or output"),
    (INTER_TOKEN_LATENCY, "each gap between two tokens of a choice"),
    (QUEUE_TIME, "arrival of a request until its first step"),
    (CACHED_TOKENS, "prompt tokens whose KV was in the prefix cache"),
    (KV_BLOCKS, "blocks of the KV cache, by state: free, used or cached"),
    (SEQUENCES, "sequences, by state: running or waiting"),
    (PREEMPTIONS, "sequences that gave their blocks up to others and start again"),
    (STEP_TIME, "one forward pass of a batch, sampling included"),
    (STEP_TOKENS, "tokens computed in steps"),
    (REQUESTS, "answered requests, by operation, model, status and error code"),
    (SLOW_CLIENTS, "streams given up because their client read too slowly"),
];

const LATENCY: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    30.0, 60.0,
];
const TOKEN_GAP: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
];
const DURATION: &[f64] = &[
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84,
];
const TOKENS: &[f64] = &[1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0];

const BUCKETS: &[(&str, &[f64])] = &[
    (TIME_TO_FIRST_TOKEN, LATENCY),
    (TIME_PER_OUTPUT_TOKEN, TOKEN_GAP),
    (REQUEST_DURATION, DURATION),
    (TOKEN_USAGE, TOKENS),
    (INTER_TOKEN_LATENCY, TOKEN_GAP),
    (QUEUE_TIME, LATENCY),
    (STEP_TIME, TOKEN_GAP),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_what_was_recorded() {
        let metrics = Metrics::new().unwrap();
        let model = metrics.model("m");
        model.blocks_used.set(3.0);
        model.time_to_first_token.record(0.03);
        metrics.count_request(
            Operation::Chat,
            Some("m"),
            404,
            Some(ErrorCode::ModelNotFound),
            Duration::from_millis(5),
        );
        let text = metrics.render();
        for line in [
            r#"grapevine_kv_blocks{gen_ai_request_model="m",state="used"} 3"#,
            r#"gen_ai_server_time_to_first_token_seconds_bucket{gen_ai_request_model="m",le="0.04"} 1"#,
            r#"gen_ai_operation_name="chat",gen_ai_request_model="m",status="404",code="model_not_found"} 1"#,
            "# TYPE grapevine_http_requests_total counter",
            "# HELP grapevine_kv_blocks blocks of the KV cache",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    #[test]
    fn two_nodes_do_not_mix() {
        let (a, b) = (Metrics::new().unwrap(), Metrics::new().unwrap());
        a.model("m").running.set(1.0);
        assert!(a.render().contains("grapevine_sequences"));
        assert!(!b.render().contains("grapevine_sequences{"));
    }
}
