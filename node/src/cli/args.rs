//! The command line. Its help is written for somebody who has never seen Grapevine.

use clap::{Args, Parser, Subcommand, ValueEnum};
use protocol::node_record::NodeRole;
use scheduler::router::{Disagg, Policy};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Serve language models from your own machines, over the OpenAI API.
#[derive(Debug, Parser)]
#[command(
    name = "vine",
    version,
    about = "Serve language models from this host, alone or as one service with others",
    after_help = "Start with `vine demo`. A model is a .gguf file, a Hugging Face directory, or \
                  `demo` for the small one that is built in."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// What is logged, as `info`, `debug` or `node=debug,engine=info`; to standard error.
    #[arg(long, global = true, env = "VINE_LOG", default_value = "warn", value_name = "FILTER")]
    pub log: String,
    /// Logs as JSON lines.
    #[arg(long, global = true)]
    pub log_json: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a node with the built-in model and chat with it: the two-minute tour.
    Demo(DemoArgs),
    /// Start a node that serves models.
    Up(UpArgs),
    /// List the nodes of the mesh as the local node sees them.
    Peers(super::peers::PeersArgs),
    /// Show the local node and its mesh.
    Status(super::mesh::AskedNodeArgs),
    /// Show why a request went where it went, what else was possible, and how it turned out.
    Explain(super::explain::ExplainArgs),
    /// Make a token with which another node joins this node's mesh.
    Invite(super::mesh::InviteArgs),
    /// Put a node out of the mesh at once.
    Revoke(super::mesh::RevokeArgs),
    /// Take the local node out of its mesh. It stops, and needs a token to come back.
    Leave(super::mesh::LeaveArgs),
    /// Show or change which nodes can let others in.
    Authority(super::mesh::AuthorityArgs),
    /// Chat with a model of a running node, in the terminal.
    Chat(ChatArgs),
    /// Generate once from a prompt, without a node.
    Run(RunArgs),
    /// List the models of a running node.
    Models(EndpointArgs),
    /// Look at this machine: CPU, memory, measured speed, ports, limits.
    Doctor(DoctorArgs),
    /// Measure speed: of a model on this machine, or of any OpenAI-compatible server.
    Bench(BenchArgs),
    /// Perplexity of a model on a text.
    Eval(EvalArgs),
    /// Look inside: logits, tokens, templates.
    #[command(subcommand)]
    Debug(DebugCommand),
}

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Exit after the sample chat: 0 when all went well.
    #[arg(long)]
    pub once: bool,
    /// One JSON object instead of text.
    #[arg(long)]
    pub json: bool,
    /// Address of the API; a port of 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8420", value_name = "ADDR")]
    pub api: SocketAddr,
    /// Nodes to start: processes of their own, joined into a mesh by tokens. The first reads prompts for the
    /// others, which write. With one there is no mesh.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub nodes: u16,
}

#[derive(Debug, Args)]
pub struct UpArgs {
    /// A model to serve: FILE.gguf, a Hugging Face DIR, `demo`, or NAME=one of these. Repeat it for more.
    #[arg(long = "model", value_name = "SPEC")]
    pub models: Vec<String>,
    /// Address of the API. Anything but loopback needs --api-keys or VINE_API_KEY.
    #[arg(long, value_name = "ADDR", help_heading = "API")]
    pub api: Option<SocketAddr>,
    /// File of API keys, a line each: NAME:KEY or NAME:KEY:TENANT. Without it VINE_API_KEY is used.
    #[arg(long, value_name = "FILE", help_heading = "API")]
    pub api_keys: Option<PathBuf>,
    /// File of keys, in the same form, whose holders may ask and change this node's mesh over the API
    /// (`vine peers --node URL`). Without it VINE_ADMIN_KEY is used; without both nobody may.
    #[arg(long, value_name = "FILE", help_heading = "API")]
    pub admin_keys: Option<PathBuf>,
    /// Serve without keys on an address that others can reach.
    #[arg(long, help_heading = "API")]
    pub insecure: bool,
    /// Seconds that a request may take, its queueing included; a client may ask for less.
    #[arg(long, value_name = "SECONDS", help_heading = "API")]
    pub request_timeout: Option<u32>,
    /// Seconds in which a client must take something of an answer that waits for it.
    #[arg(long, value_name = "SECONDS", help_heading = "API")]
    pub write_timeout: Option<u32>,
    /// What the mesh uses this node for: `prefill` computes prompts for others, `decode` generates and
    /// computes no prompt of others. Default: both.
    #[arg(long, value_name = "ROLE", help_heading = "Mesh")]
    pub role: Option<RoleName>,
    /// Whether others compute prompts for this node: `auto` where that is quicker or spares running
    /// streams, `always` wherever one can, `never`. Default: auto.
    #[arg(long, value_name = "WHEN", help_heading = "Mesh")]
    pub disagg: Option<DisaggName>,
    /// By what this node chooses who answers, to compare: nothing but `cost` is meant for use.
    #[arg(long, value_name = "POLICY", help_heading = "Mesh", hide = true)]
    pub route_by: Option<PolicyName>,
    /// Memory for KV blocks that have fallen out of the KV cache, for each model; default: none, because
    /// on a CPU --kv-memory is the better place for it.
    #[arg(long, value_name = "SIZE", help_heading = "Engine")]
    pub kv_host_memory: Option<String>,
    /// Disk space below --data for KV blocks that have fallen out of memory, for each model; they are
    /// found again after a restart. Default: none.
    #[arg(long, value_name = "SIZE", help_heading = "Engine")]
    pub kv_disk: Option<String>,
    /// Where the node keeps its state.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Settings as TOML; what is said on the command line wins.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// End when the process that started this one ends.
    #[arg(long, hide = true)]
    pub with_parent: bool,
    #[command(flatten)]
    pub mesh: super::mesh::MeshArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// How a model is loaded and run.
#[derive(Debug, Clone, Default, Args)]
pub struct EngineArgs {
    /// Threads that compute; default: the physical cores of this machine.
    #[arg(short, long, value_name = "N", help_heading = "Engine")]
    pub threads: Option<usize>,
    /// Memory for the KV cache, as 512MiB or 4GiB; default: a quarter of what is free, at most what the
    /// context of 16 sequences needs.
    #[arg(long, value_name = "SIZE", help_heading = "Engine")]
    pub kv_memory: Option<String>,
    /// Type of cached keys and values.
    #[arg(long, value_name = "TYPE", help_heading = "Engine")]
    pub kv_dtype: Option<KvType>,
    /// Quantize float weights while loading.
    #[arg(long, value_name = "FORMAT", help_heading = "Engine")]
    pub quant: Option<QuantType>,
    /// Longest prompt and answer together; default: what the model was trained for, if memory allows.
    #[arg(long, value_name = "TOKENS", help_heading = "Engine")]
    pub context: Option<usize>,
    /// Tokens of one step at most.
    #[arg(long, value_name = "TOKENS", help_heading = "Engine")]
    pub step_tokens: Option<usize>,
    /// How long a step that writes answers may take for prompts of others; 0 for as long as it takes.
    /// Default 50.
    #[arg(long, value_name = "MS", help_heading = "Engine")]
    pub step_time_ms: Option<u64>,
    /// Wait between two steps, so that one can watch: the demo's model is too fast for that.
    #[arg(long, value_name = "MS", help_heading = "Engine", hide = true)]
    pub step_pause_ms: Option<u64>,
    /// Force an instruction set, to compare or to search for a fault.
    #[arg(long, value_name = "ISA", help_heading = "Engine", hide = true)]
    pub isa: Option<IsaName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvType {
    F16,
    Bf16,
    F32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantType {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RoleName {
    Both,
    Prefill,
    Decode,
}

impl From<RoleName> for NodeRole {
    fn from(name: RoleName) -> NodeRole {
        match name {
            RoleName::Both => NodeRole::Both,
            RoleName::Prefill => NodeRole::Prefill,
            RoleName::Decode => NodeRole::Decode,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DisaggName {
    Auto,
    Always,
    Never,
}

impl From<DisaggName> for Disagg {
    fn from(name: DisaggName) -> Disagg {
        match name {
            DisaggName::Auto => Disagg::Auto,
            DisaggName::Always => Disagg::Always,
            DisaggName::Never => Disagg::Never,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PolicyName {
    Cost,
    LeastLoaded,
    RoundRobin,
    PrefixOnly,
}

impl From<PolicyName> for Policy {
    fn from(name: PolicyName) -> Policy {
        match name {
            PolicyName::Cost => Policy::Cost,
            PolicyName::LeastLoaded => Policy::LeastLoaded,
            PolicyName::RoundRobin => Policy::RoundRobin,
            PolicyName::PrefixOnly => Policy::PrefixOnly,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IsaName {
    Scalar,
    Avx2,
    Avx512,
    Avx512Bf16,
    Neon,
    NeonDot,
    NeonI8mm,
}

/// A running node.
#[derive(Debug, Clone, Args)]
pub struct EndpointArgs {
    /// Base URL of the node (or of any OpenAI-compatible server).
    #[arg(
        long,
        env = "VINE_ENDPOINT",
        default_value = "http://127.0.0.1:8420",
        value_name = "URL"
    )]
    pub endpoint: String,
    /// Key for it.
    #[arg(long, env = "VINE_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub key: Option<String>,
    /// One JSON object instead of text.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub endpoint: EndpointArgs,
    /// Which model; default: the only one, or the first.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Instructions that stand before the conversation.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Most tokens of an answer.
    #[arg(short = 'n', long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Ask this and exit; without it the terminal is read line by line.
    #[arg(value_name = "MESSAGE")]
    pub message: Option<String>,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// FILE.gguf, a Hugging Face DIR, or `demo`.
    #[arg(long, value_name = "SPEC")]
    pub model: String,
    /// The prompt; `-` reads standard input.
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// Tokens to generate at most.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    pub max_tokens: usize,
    /// Always the most probable token.
    #[arg(long)]
    pub greedy: bool,
    #[arg(long, value_name = "T", default_value_t = 0.8, conflicts_with = "greedy")]
    pub temperature: f32,
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub top_p: f32,
    #[arg(long, value_name = "SEED")]
    pub seed: Option<i64>,
    /// Put the prompt into the model's chat template, as a user's message.
    #[arg(long)]
    pub chat: bool,
    /// The prompt is a list of token ids: 1,2,3.
    #[arg(long, conflicts_with = "chat")]
    pub tokens: bool,
    /// Go on past the model's end-of-text token.
    #[arg(long)]
    pub ignore_eos: bool,
    /// One JSON object: tokens, text, ttft_ms, tokens_per_second.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// One JSON object instead of text.
    #[arg(long)]
    pub json: bool,
    /// Threads to measure with.
    #[arg(short, long, value_name = "N")]
    pub threads: Option<usize>,
    /// Skip the measurements (they take about five seconds).
    #[arg(long)]
    pub quick: bool,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Model to measure on this machine.
    #[arg(long, value_name = "SPEC", required_unless_present = "endpoint")]
    pub model: Option<String>,
    /// Prompt lengths.
    #[arg(short = 'p', long, value_name = "TOKENS", value_delimiter = ',', default_value = "512")]
    pub prompt: Vec<usize>,
    /// Tokens generated.
    #[arg(short = 'n', long, value_name = "TOKENS", value_delimiter = ',', default_value = "128")]
    pub generate: Vec<usize>,
    /// Tokens already in the context.
    #[arg(short = 'd', long, value_name = "TOKENS", value_delimiter = ',', default_value = "0")]
    pub depth: Vec<usize>,
    /// Sequences decoded at once.
    #[arg(short = 'b', long, value_name = "N", value_delimiter = ',', default_value = "1")]
    pub batch: Vec<usize>,
    /// Repetitions; the median is reported.
    #[arg(short = 'r', long, value_name = "N", default_value_t = 5)]
    pub repetitions: usize,
    /// Say where the time of a step goes.
    #[arg(long)]
    pub profile: bool,
    /// One JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub load: LoadArgs,
}

/// Load on an OpenAI-compatible server.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// Measure this server instead: its base URL, as http://127.0.0.1:8420.
    #[arg(long, value_name = "URL", help_heading = "Server under load")]
    pub endpoint: Option<String>,
    #[arg(
        long,
        env = "VINE_API_KEY",
        hide_env_values = true,
        value_name = "KEY",
        help_heading = "Server under load"
    )]
    pub key: Option<String>,
    /// Name of the model there; default: the first that it lists.
    #[arg(long, value_name = "NAME", help_heading = "Server under load")]
    pub served_model: Option<String>,
    /// Closed loop: clients that send the next request when the last is answered.
    #[arg(
        short = 'c',
        long,
        value_name = "N",
        default_value_t = 8,
        help_heading = "Server under load"
    )]
    pub clients: usize,
    /// Open loop: requests each second, whatever the answers do (Poisson arrivals).
    #[arg(long, value_name = "R", help_heading = "Server under load")]
    pub rate: Option<f64>,
    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 32, help_heading = "Server under load")]
    pub requests: usize,
    /// Words that all prompts begin with.
    #[arg(long, value_name = "WORDS", default_value_t = 0, help_heading = "Server under load")]
    pub shared_prefix: usize,
    /// A request counts as good when its first token came within this.
    #[arg(long, value_name = "MS", default_value_t = 2000.0, help_heading = "Server under load")]
    pub slo_ttft_ms: f64,
    /// ... and the time for each further token stayed within this, on average.
    #[arg(long, value_name = "MS", default_value_t = 100.0, help_heading = "Server under load")]
    pub slo_tpot_ms: f64,
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    #[arg(long, value_name = "SPEC")]
    pub model: String,
    /// Text to predict.
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Window of the context: each is scored on its second half.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub window: usize,
    /// Score only this many windows.
    #[arg(long, value_name = "N")]
    pub chunks: Option<usize>,
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Subcommand)]
pub enum DebugCommand {
    /// Logits of given tokens, as little-endian f32 [tokens, vocab].
    Logits(LogitsArgs),
    /// Text to token ids.
    Tokenize(TokenizeArgs),
    /// Token ids to text.
    Detokenize(DetokenizeArgs),
    /// Messages to the prompt that the model reads.
    Template(TemplateArgs),
}

#[derive(Debug, Args)]
pub struct LogitsArgs {
    #[arg(long, value_name = "SPEC")]
    pub model: String,
    /// Ids, as 1,2,3.
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    pub tokens: Vec<u32>,
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Args)]
pub struct TokenizeArgs {
    #[arg(long, value_name = "SPEC")]
    pub model: String,
    /// The text; `-` reads standard input. With --lines each line is a JSON string of its own.
    #[arg(long, value_name = "TEXT", default_value = "-")]
    pub text: String,
    /// Also what the model expects around a text (begin-of-sequence).
    #[arg(long)]
    pub add_special: bool,
    #[arg(long)]
    pub lines: bool,
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct DetokenizeArgs {
    #[arg(long, value_name = "SPEC")]
    pub model: String,
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    pub tokens: Vec<u32>,
    /// Show special tokens by their names.
    #[arg(long)]
    pub special: bool,
}

#[derive(Debug, Args)]
pub struct TemplateArgs {
    #[arg(long, value_name = "SPEC")]
    pub model: String,
    /// JSON: a list of messages, or an object with messages, tools and template variables; `-` reads
    /// standard input.
    #[arg(long, value_name = "JSON", default_value = "-")]
    pub messages: String,
    /// Show the token ids instead of the text.
    #[arg(long)]
    pub tokens: bool,
}
