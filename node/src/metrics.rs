//! Every metric of the node: names, labels, buckets. Names follow OpenTelemetry's GenAI conventions
//! (semantic conventions 1.37, in Prometheus spelling) where one exists, `grapevine_` elsewhere.
//!
//! One recorder belongs to one node, so that several nodes in one process do not mix. Labels come
//! from closed sets (models of the registry, endpoints, codes): a client cannot make new series.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cache::tiers::TiersStats;
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use protocol::api::ErrorCode;

use crate::mesh::overlay::{CutOff, Nat};

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

/// A value that somebody else keeps, read when it is scraped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// One of a closed set; counters end in `_total`, everything else is a gauge.
    pub name: &'static str,
    pub label: Option<(&'static str, &'static str)>,
    pub value: f64,
}

impl Sample {
    pub const fn new(name: &'static str, value: f64) -> Sample {
        Sample { name, label: None, value }
    }

    pub const fn labelled(
        name: &'static str,
        key: &'static str,
        label: &'static str,
        value: f64,
    ) -> Sample {
        Sample { name, label: Some((key, label)), value }
    }
}

/// Gives samples; those of one name follow each other.
pub type SampleSource = Box<dyn Fn() -> Vec<Sample> + Send + Sync>;

/// The recorder of a node.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    sources: Mutex<Vec<SampleSource>>,
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
        Ok(Metrics { recorder, handle, sources: Mutex::default() })
    }

    /// Shows these values beside the node's own.
    pub fn add_source(&self, source: SampleSource) {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).push(source);
    }

    /// The text that Prometheus scrapes.
    pub fn render(&self) -> String {
        self.handle.run_upkeep();
        let mut text = self.handle.render();
        for source in self.sources.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let mut described = "";
            for Sample { name, label, value } in source() {
                if name != described {
                    let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
                    let help = HELP.iter().find(|(known, _)| *known == name);
                    let help = help.map_or("see docs/operating.md", |(_, help)| help);
                    text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
                    described = name;
                }
                match label {
                    Some((key, label)) => {
                        text.push_str(&format!("{name}{{{key}=\"{label}\"}} {value}\n"));
                    }
                    None => text.push_str(&format!("{name} {value}\n")),
                }
            }
        }
        text
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
            tiers: [self.tier(model, "host"), self.tier(model, "disk")],
            tier_paused: self.gauge(KV_TIER_PAUSED, &plain),
            fetches_late: self.counter(KV_FETCHES_LATE, &plain),
        }
    }

    fn tier(&self, model: &str, tier: &'static str) -> TierMetrics {
        let labels = [(MODEL, model), ("tier", tier)];
        TierMetrics {
            blocks: self.gauge(KV_TIER_BLOCKS, &labels),
            hits: self.counter(KV_TIER_HITS, &labels),
            stored: self.counter(KV_TIER_STORED, &labels),
            dropped: self.counter(KV_TIER_DROPPED, &labels),
            corrupt: self.counter(KV_TIER_CORRUPT, &labels),
        }
    }

    /// The handles of the overlay plane; made once, when it starts.
    pub fn overlay(&self) -> OverlayMetrics {
        let counter = |name, key, value| self.counter(name, &[(key, value)]);
        let peers = |path| self.gauge(OVERLAY_PEERS, &[("path", path)]);
        OverlayMetrics {
            members: self.gauge(OVERLAY_MEMBERS, &[]),
            peers_direct: peers("direct"),
            peers_relayed: peers("relayed"),
            relays_held: self.gauge(OVERLAY_RELAYS, &[]),
            circuits: self.gauge(OVERLAY_CIRCUITS, &[]),
            nat: ["unknown", "public", "private"]
                .map(|status| self.gauge(OVERLAY_NAT, &[("status", status)])),
            connections: ["in", "out"].map(|d| counter(OVERLAY_CONNECTIONS, "direction", d)),
            dials_failed: self.counter(OVERLAY_DIALS_FAILED, &[]),
            refused_stranger: counter(OVERLAY_REFUSED, "reason", "stranger"),
            refused_limit: counter(OVERLAY_REFUSED, "reason", "limit"),
            refused_handshake: counter(OVERLAY_REFUSED, "reason", "handshake"),
            cut_off: CutOff::ALL.map(|why| counter(OVERLAY_CUT_OFF, "reason", why.as_str())),
            messages_received: self.counter(OVERLAY_RECEIVED, &[]),
            ignored_stranger: counter(OVERLAY_IGNORED, "reason", "stranger"),
            ignored_rate: counter(OVERLAY_IGNORED, "reason", "rate"),
            publishes_sent: counter(OVERLAY_PUBLISHED, "outcome", "sent"),
            publishes_unheard: counter(OVERLAY_PUBLISHED, "outcome", "unheard"),
            publishes_limited: counter(OVERLAY_PUBLISHED, "outcome", "limited"),
            publishes_failed: counter(OVERLAY_PUBLISHED, "outcome", "failed"),
            slow_peers: self.counter(OVERLAY_SLOW_PEERS, &[]),
            holes_punched: counter(OVERLAY_HOLES, "outcome", "punched"),
            holes_failed: counter(OVERLAY_HOLES, "outcome", "failed"),
            events_dropped: self.counter(OVERLAY_EVENTS_DROPPED, &[]),
            restarts: self.counter(OVERLAY_RESTARTS, &[]),
        }
    }

    /// Counts connections that were closed because their client took nothing.
    pub fn write_timeouts(&self) -> Counter {
        self.counter(WRITE_TIMEOUTS, &[])
    }

    /// Counts a stream whose node was lost in the middle: whether another went on with it.
    pub fn count_continued(&self, continued: bool) {
        let outcome = if continued { "continued" } else { "failed" };
        self.counter(STREAMS_CONTINUED, &[("outcome", outcome)]).increment(1);
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
    /// Host memory and disk.
    tiers: [TierMetrics; 2],
    tier_paused: Gauge,
    fetches_late: Counter,
}

/// Handles of one tier below a model's pool.
#[derive(Clone)]
struct TierMetrics {
    blocks: Gauge,
    hits: Counter,
    stored: Counter,
    dropped: Counter,
    corrupt: Counter,
}

impl ModelMetrics {
    /// Shows what lies below the pool.
    pub fn show_tiers(&self, stats: &TiersStats) {
        for (shown, tier) in self.tiers.iter().zip([&stats.host, &stats.disk]) {
            shown.blocks.set(tier.blocks as f64);
            shown.hits.absolute(tier.hits);
            shown.stored.absolute(tier.stored);
            shown.dropped.absolute(tier.dropped);
            shown.corrupt.absolute(tier.corrupt);
        }
        self.tier_paused.set(f64::from(u8::from(stats.disk_is_paused)));
        self.fetches_late.absolute(stats.fetches_late);
    }
}

/// Handles of the overlay plane's metrics.
#[derive(Clone)]
pub struct OverlayMetrics {
    /// Nodes that may connect.
    pub members: Gauge,
    pub peers_direct: Gauge,
    pub peers_relayed: Gauge,
    /// Relays on which this node has a place.
    pub relays_held: Gauge,
    /// Connections of others that go through this node.
    pub circuits: Gauge,
    nat: [Gauge; 3],
    connections: [Counter; 2],
    pub dials_failed: Counter,
    pub refused_stranger: Counter,
    pub refused_limit: Counter,
    pub refused_handshake: Counter,
    cut_off: [Counter; CutOff::ALL.len()],
    /// Broadcasts delivered to this node.
    pub messages_received: Counter,
    pub ignored_stranger: Counter,
    pub ignored_rate: Counter,
    pub publishes_sent: Counter,
    /// Broadcasts that no connected member listened for.
    pub publishes_unheard: Counter,
    /// Broadcasts beyond this node's own rate.
    pub publishes_limited: Counter,
    pub publishes_failed: Counter,
    /// Peers that take broadcasts too slowly and miss some.
    pub slow_peers: Counter,
    pub holes_punched: Counter,
    pub holes_failed: Counter,
    /// Events that the node was too far behind to take.
    pub events_dropped: Counter,
    /// How often the overlay was built anew after a fault.
    pub restarts: Counter,
}

impl OverlayMetrics {
    /// Connections that came up, by who began them.
    pub fn connections(&self, dialled: bool) -> &Counter {
        &self.connections[usize::from(dialled)]
    }

    pub fn cut_off(&self, why: CutOff) -> &Counter {
        &self.cut_off[why as usize]
    }

    /// One of the three gauges is 1.
    pub fn nat(&self, now: Nat) {
        for (i, gauge) in self.nat.iter().enumerate() {
            gauge.set(f64::from(u8::from(i == now as usize)));
        }
    }
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
const KV_TIER_BLOCKS: &str = "grapevine_kv_tier_blocks";
const KV_TIER_HITS: &str = "grapevine_kv_tier_hits_total";
const KV_TIER_STORED: &str = "grapevine_kv_tier_stored_total";
const KV_TIER_DROPPED: &str = "grapevine_kv_tier_dropped_total";
const KV_TIER_CORRUPT: &str = "grapevine_kv_tier_corrupt_total";
const KV_TIER_PAUSED: &str = "grapevine_kv_tier_paused";
const KV_FETCHES_LATE: &str = "grapevine_kv_fetches_late_total";
const SEQUENCES: &str = "grapevine_sequences";
const PREEMPTIONS: &str = "grapevine_preemptions_total";
const STEP_TIME: &str = "grapevine_step_duration_seconds";
const STEP_TOKENS: &str = "grapevine_step_tokens_total";
const REQUESTS: &str = "grapevine_http_requests_total";
const SLOW_CLIENTS: &str = "grapevine_slow_clients_total";
const WRITE_TIMEOUTS: &str = "grapevine_http_write_timeouts_total";
const STREAMS_CONTINUED: &str = "grapevine_streams_continued_total";

const OVERLAY_MEMBERS: &str = "grapevine_overlay_members";
const OVERLAY_PEERS: &str = "grapevine_overlay_peers";
const OVERLAY_RELAYS: &str = "grapevine_overlay_relays";
const OVERLAY_CIRCUITS: &str = "grapevine_overlay_circuits";
const OVERLAY_NAT: &str = "grapevine_overlay_nat";
const OVERLAY_CONNECTIONS: &str = "grapevine_overlay_connections_total";
const OVERLAY_DIALS_FAILED: &str = "grapevine_overlay_dials_failed_total";
const OVERLAY_REFUSED: &str = "grapevine_overlay_refused_total";
const OVERLAY_CUT_OFF: &str = "grapevine_overlay_cut_off_total";
const OVERLAY_RECEIVED: &str = "grapevine_overlay_messages_received_total";
const OVERLAY_IGNORED: &str = "grapevine_overlay_messages_ignored_total";
const OVERLAY_PUBLISHED: &str = "grapevine_overlay_published_total";
const OVERLAY_SLOW_PEERS: &str = "grapevine_overlay_slow_peers_total";
const OVERLAY_HOLES: &str = "grapevine_overlay_hole_punches_total";
const OVERLAY_EVENTS_DROPPED: &str = "grapevine_overlay_events_dropped_total";
const OVERLAY_RESTARTS: &str = "grapevine_overlay_restarts_total";

const HELP: &[(&str, &str)] = &[
    (TIME_TO_FIRST_TOKEN, "arrival of a request until its first token, queueing included"),
    (TIME_PER_OUTPUT_TOKEN, "mean gap between the tokens of a choice"),
    (REQUEST_DURATION, "arrival of a request until the end of its answer"),
    (TOKEN_USAGE, "tokens of a request, by type: input or output"),
    (INTER_TOKEN_LATENCY, "each gap between two tokens of a choice"),
    (QUEUE_TIME, "arrival of a request until its first step"),
    (CACHED_TOKENS, "prompt tokens whose KV was in the prefix cache"),
    (KV_BLOCKS, "blocks of the KV cache, by state: free, used or cached"),
    (KV_TIER_BLOCKS, "KV blocks kept below the pool, by tier: host or disk"),
    (KV_TIER_HITS, "blocks that came up into the pool, by tier"),
    (KV_TIER_STORED, "blocks put into a tier"),
    (KV_TIER_DROPPED, "blocks that a tier forgot for want of room or of a working disk"),
    (KV_TIER_CORRUPT, "records that did not verify"),
    (KV_TIER_PAUSED, "1 while the disk is left alone because it failed"),
    (KV_FETCHES_LATE, "fetches given up because computing would have been as fast"),
    (SEQUENCES, "sequences, by state: running or waiting"),
    (PREEMPTIONS, "sequences that gave their blocks up to others and start again"),
    (STEP_TIME, "one forward pass of a batch, sampling included"),
    (STEP_TOKENS, "tokens computed in steps"),
    (REQUESTS, "answered requests, by operation, model, status and error code"),
    (SLOW_CLIENTS, "streams given up because their client read too slowly"),
    (OVERLAY_MEMBERS, "nodes that may connect to the overlay"),
    (OVERLAY_PEERS, "members connected on the overlay, by path: direct or relayed"),
    (OVERLAY_RELAYS, "relays on which this node has a place"),
    (OVERLAY_CIRCUITS, "connections of other members that go through this node"),
    (OVERLAY_NAT, "1 for what is known of this node's reachability"),
    (OVERLAY_CONNECTIONS, "overlay connections that came up, by direction"),
    (OVERLAY_DIALS_FAILED, "dials of members that came to nothing"),
    (OVERLAY_REFUSED, "incoming connections that were refused, by reason"),
    (OVERLAY_CUT_OFF, "members kept away for a while because they misbehaved, by reason"),
    (OVERLAY_RECEIVED, "broadcasts delivered to this node"),
    (OVERLAY_IGNORED, "broadcasts neither delivered nor passed on, by reason"),
    (OVERLAY_PUBLISHED, "broadcasts of this node, by outcome"),
    (OVERLAY_SLOW_PEERS, "times that a peer missed broadcasts because it took them too slowly"),
    (OVERLAY_HOLES, "attempts to make a relayed connection a direct one, by outcome"),
    (OVERLAY_EVENTS_DROPPED, "overlay events that found no room"),
    (OVERLAY_RESTARTS, "times that the overlay was built anew after a fault"),
    (WRITE_TIMEOUTS, "connections closed because their client took nothing"),
    (
        STREAMS_CONTINUED,
        "streams that passed through here whose node was lost in the middle, by outcome",
    ),
    ("grapevine_members", "members of the mesh, this node included, by state"),
    (
        "grapevine_membership_health",
        "0 is well; at n this node's time limits are n + 1 times as long",
    ),
    ("grapevine_membership_probes_total", "probes of other members"),
    ("grapevine_membership_probes_failed_total", "probes that nobody answered, directly or not"),
    ("grapevine_membership_deaths_total", "members that this node has held for dead"),
    ("grapevine_membership_returns_total", "members that came back"),
    ("grapevine_membership_refutations_total", "times that this node denied its own death"),
    ("grapevine_membership_stalls_total", "times that this node was not run for a while"),
    ("grapevine_membership_syncs_total", "comparisons of whole views"),
    (
        "grapevine_membership_accusations_damped_total",
        "suspicions of a member that was wrong too often",
    ),
    ("grapevine_membership_malformed_total", "datagrams that could not be read"),
    (
        "grapevine_membership_claims_refused_total",
        "news that only the member itself can tell, by reason",
    ),
    ("grapevine_membership_datagrams_total", "datagrams of membership, by direction"),
    ("grapevine_membership_bytes_total", "bytes of membership without QUIC's own, by direction"),
    ("grapevine_router_choices_total", "requests given to a replica, by node: own or peer"),
    ("grapevine_router_decisions_total", "choices of a replica, by why it was chosen"),
    (
        "grapevine_router_prefills_total",
        "prompts about to run here, by where their keys and values come from",
    ),
    ("grapevine_router_first_tokens_total", "choices whose first token was seen"),
    (
        "grapevine_router_estimate_error_seconds_total",
        "how far estimates of the time to these first tokens were off, up or down",
    ),
    (
        "grapevine_router_estimate_bias_seconds",
        "what estimates are too low by of late; below zero, too high",
    ),
    (
        "grapevine_router_regret_seconds_total",
        "what the best of the others would have saved, as far as can be estimated, by why",
    ),
    ("grapevine_stream_copies", "streams of other nodes of which a copy is kept here"),
    ("grapevine_stream_copies_bytes", "what they take"),
    ("grapevine_kv_bytes_total", "KV blocks from and to other nodes, in bytes, by direction"),
    ("grapevine_kv_blocks_attached_total", "KV blocks that came from other nodes"),
    ("grapevine_kv_hand_offs_total", "prompts for which other nodes were asked, by outcome"),
    ("grapevine_kv_hand_off_seconds_total", "time that complete hand-offs have taken"),
    ("grapevine_kv_attempts_failed_total", "peers that gave no blocks, or not all"),
    ("grapevine_kv_misbehaviours_total", "those of them that did what no sound peer does"),
    ("grapevine_kv_transfers_served_total", "prompts of other nodes, by outcome"),
    ("grapevine_kv_directory_names", "block names that this node keeps for the directory"),
    ("grapevine_kv_directory_nodes", "replicas that it keeps them for"),
    ("grapevine_kv_directory_owners_behind", "nodes that do not know yet what is cached here"),
    ("grapevine_kv_directory_reports_total", "reports of what is cached here"),
    ("grapevine_kv_directory_events_total", "blocks stored and removed that were reported"),
    ("grapevine_kv_directory_dumped_total", "names reported because an owner had to hear all"),
    ("grapevine_kv_directory_unequal_total", "reports that did not add up: a fault of a program"),
    (
        "grapevine_router_attempts_lost_total",
        "requests that a chosen node did not answer, by outcome",
    ),
    ("grapevine_router_unavailable_total", "requests for which no replica could be asked"),
    ("grapevine_router_in_flight", "requests that other nodes answer for this one now"),
    ("grapevine_router_breakers_open", "nodes left alone because they failed too often"),
    ("grapevine_node_records", "members whose record is known"),
    (
        "grapevine_record_exchanges_total",
        "exchanges of node records that this node began, by outcome",
    ),
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
        a.add_source(Box::new(|| {
            let members =
                |state, value| Sample::labelled("grapevine_members", "state", state, value);
            vec![
                members("alive", 3.0),
                members("dead", 0.0),
                Sample::new("grapevine_mesh_frames_total", 7.0),
            ]
        }));
        let text = a.render();
        assert!(text.ends_with("counter\ngrapevine_mesh_frames_total 7\n"), "{text}");
        assert_eq!(text.matches("# TYPE grapevine_members gauge").count(), 1, "{text}");
        assert!(text.contains("\ngrapevine_members{state=\"dead\"} 0\n"), "{text}");
    }
}
