//! `vine up`: a node that serves models until it is told to stop.

use super::args::{DisaggName, EngineArgs, KvType, QuantType, RoleName, UpArgs};
use super::mesh::{self, MeshArgs};
use super::model::{self, LoadedModel, ModelSpec, load};
use super::system;
use anyhow::{Context, bail};
use engine::tiers::{KvTiers, TiersOptions};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use node::measured::Host;
use node::mesh::{ControlRoutes, Mesh, Roster, kv_secret};
use node::{ADMIN_KEY_VARIABLE, ApiKeys, HttpLimits, Loaded, ModelOptions, Node, NodeOptions};
use protocol::node_record::NodeRole;
use scheduler::router::{Disagg, Policy};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The settings of `--config`, all optional; the command line wins.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Config {
    #[serde(default)]
    models: Vec<String>,
    api: Option<SocketAddr>,
    api_keys: Option<PathBuf>,
    admin_keys: Option<PathBuf>,
    insecure: Option<bool>,
    request_timeout: Option<u32>,
    write_timeout: Option<u32>,
    data: Option<PathBuf>,
    threads: Option<usize>,
    mesh: Option<SocketAddr>,
    #[serde(default)]
    mesh_address: Vec<SocketAddr>,
    mdns: Option<bool>,
    role: Option<String>,
    disagg: Option<String>,
    kv_memory: Option<String>,
    kv_host_memory: Option<String>,
    kv_disk: Option<String>,
    kv_dtype: Option<String>,
    quant: Option<String>,
    context: Option<usize>,
    step_tokens: Option<usize>,
    step_time_ms: Option<u64>,
}

/// A node to start.
pub struct Served {
    pub api: SocketAddr,
    pub models: Vec<String>,
    pub keys: ApiKeys,
    pub admin_keys: ApiKeys,
    pub insecure: bool,
    pub http: HttpLimits,
    /// What the mesh uses it for.
    pub role: NodeRole,
    /// Whether others compute prompts for it.
    pub disagg: Disagg,
    /// By what it chooses who answers.
    pub policy: Policy,
    /// Where the node keeps its secret; without one it lives in memory.
    pub data: Option<PathBuf>,
    /// Room for KV blocks below each model's KV cache, in bytes: in host memory, and on disk below `data`.
    pub kv_host_bytes: usize,
    pub kv_disk_bytes: usize,
    /// Show progress on the terminal.
    pub bar: bool,
    /// The mesh to take part in.
    pub mesh: Option<(Mesh, Arc<Roster>, ControlRoutes)>,
}

impl Served {
    pub fn new(api: SocketAddr, models: Vec<String>) -> Self {
        Served {
            api,
            models,
            keys: ApiKeys::default(),
            admin_keys: ApiKeys::default(),
            insecure: false,
            http: HttpLimits::default(),
            role: NodeRole::default(),
            disagg: Disagg::default(),
            policy: Policy::default(),
            data: None,
            kv_host_bytes: 0,
            kv_disk_bytes: 0,
            bar: true,
            mesh: None,
        }
    }
}

pub async fn up(args: UpArgs) -> anyhow::Result<()> {
    if args.with_parent {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM)?;
    }
    let (mut served, mesh, engine) = settings(args)?;
    let models = served.models.len();
    let running = match &served.data {
        Some(data) => mesh::start(&mesh, data).await?,
        None => None,
    };
    served.mesh = running.as_ref().map(|r| (r.mesh.clone(), r.roster.clone(), r.routes.clone()));
    let node = serve(served, &engine).await?;
    println!("serving {models} model(s) at {}/v1", node.url());
    let Some(running) = running else {
        std::io::stdout().flush()?;
        return Ok(node.run_until_signal().await?);
    };
    println!("{}", mesh::line(&running.mesh));
    std::io::stdout().flush()?;
    tokio::select! {
        ended = node.run_until_signal() => {
            running.mesh.shutdown().await;
            Ok(ended?)
        }
        () = running.left.cancelled() => {
            // The answer to `vine leave` is on its way.
            tokio::time::sleep(LEAVE_ANSWER).await;
            Ok(())
        }
    }
}

/// Starts the node and waits until every model is ready.
pub async fn serve(served: Served, engine: &EngineArgs) -> anyhow::Result<Node> {
    let secret = match (&served.mesh, &served.data) {
        (Some((mesh, roster, _)), Some(data)) => match kv_secret(mesh, roster, data).await? {
            Some(secret) => secret,
            None => {
                tracing::warn!(
                    "no member that could be reached gave this node the mesh's KV secret: it computes \
                     every prompt itself until it is started again"
                );
                random_secret()?
            }
        },
        (_, Some(data)) => node_secret(data)?,
        (_, None) => random_secret()?,
    };
    let mut models = Vec::new();
    for spec in &served.models {
        let spec = ModelSpec::parse(spec)?;
        let tiers = model::tiers(&spec.name, &served);
        models.push(model_options(spec, engine.clone(), secret, tiers));
    }
    let mut options = NodeOptions::new(served.api, models);
    options.keys = served.keys;
    options.insecure = served.insecure;
    options.http = served.http;
    options.role = served.role;
    (options.disagg, options.policy) = (served.disagg, served.policy);
    options.without_models = served.mesh.is_some();
    options.admin = served.mesh.as_ref().map(|(_, _, routes)| (routes.clone(), served.admin_keys));
    let bars = Bars::new(served.bar && std::io::stderr().is_terminal());
    options.on_progress = Some({
        let bars = bars.clone();
        Arc::new(move |progress| bars.set(progress.model, progress.done))
    });
    let node = node::serve(options).await?;
    // Before the models are loaded: others see that they come.
    if let (Some((mesh, roster, _)), Some(data)) = (served.mesh, &served.data) {
        node.join(mesh, roster, data)?;
        let threads = engine.threads.unwrap_or_else(model::default_threads);
        let cpu = system::cpu_name().unwrap_or_default();
        let host = Host { cpu, threads, free_bytes: system::available_memory_bytes };
        node.measure_when_idle(data.join("measured.json"), host);
    }
    tokio::select! {
        ready = node.ready() => ready?,
        stopped = node::shutdown_signal() => {
            stopped?;
            node.shutdown().await;
            bail!("stopped while loading");
        }
    }
    bars.clear();
    Ok(node)
}

/// A model whose files are opened at once, so that bad ones are refused before anything starts, and
/// whose weights are loaded in the background.
fn model_options(
    spec: ModelSpec,
    engine: EngineArgs,
    secret: [u8; 32],
    tiers: TiersOptions,
) -> ModelOptions {
    let id = spec.name.clone();
    let loader = move |report: &dyn Fn(f32, &'static str)| {
        report(0.0, "opening");
        let read = || load(spec.open()?, &engine, secret, &mut |done| report(done, "loading"));
        let LoadedModel { mut replica, template, hidden, fingerprint } =
            read().map_err(|e: anyhow::Error| format!("{e:#}"))?;
        if let Some(tiers) = KvTiers::open(&tiers, replica.record_format()) {
            replica.set_tiers(tiers);
        }
        let loaded = Loaded::new(replica, template, hidden, fingerprint);
        Ok(match engine.step_pause_ms {
            Some(ms) => loaded.paced(Duration::from_millis(ms)),
            None => loaded,
        })
    };
    ModelOptions { id, loader: Box::new(loader) }
}

/// Command line over environment over file.
fn settings(args: UpArgs) -> anyhow::Result<(Served, MeshArgs, EngineArgs)> {
    let config = match &args.config {
        None => Config::default(),
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            toml::from_str(&text).with_context(|| format!("{} is not usable", path.display()))?
        }
    };
    let models = if args.models.is_empty() { config.models } else { args.models };
    if models.is_empty() && !args.mesh.is_asked_for() && config.mesh.is_none() {
        bail!("no model: say --model FILE.gguf, a Hugging Face directory, or `demo`");
    }
    let keys = match args.api_keys.or(config.api_keys) {
        Some(path) => ApiKeys::from_file(&path)?,
        None => ApiKeys::from_env()?,
    };
    let admin_keys = match args.admin_keys.or(config.admin_keys) {
        Some(path) => ApiKeys::from_file(&path)?,
        None => ApiKeys::from_env_of(ADMIN_KEY_VARIABLE)?,
    };
    let engine = EngineArgs {
        threads: args.engine.threads.or(config.threads),
        kv_memory: args.engine.kv_memory.or(config.kv_memory),
        kv_dtype: args.engine.kv_dtype.or(value_of::<KvType>("kv-dtype", config.kv_dtype)?),
        quant: args.engine.quant.or(value_of::<QuantType>("quant", config.quant)?),
        context: args.engine.context.or(config.context),
        step_tokens: args.engine.step_tokens.or(config.step_tokens),
        step_time_ms: args.engine.step_time_ms.or(config.step_time_ms),
        step_pause_ms: args.engine.step_pause_ms,
        isa: args.engine.isa,
    };
    let seconds = |setting: Option<u32>, default| match setting {
        Some(s) => Duration::from_secs(u64::from(s.max(1))),
        None => default,
    };
    let limits = HttpLimits::default();
    let http = HttpLimits {
        request_timeout: seconds(
            args.request_timeout.or(config.request_timeout),
            limits.request_timeout,
        ),
        write_timeout: seconds(args.write_timeout.or(config.write_timeout), limits.write_timeout),
        ..limits
    };
    let disagg = args.disagg.or(value_of::<DisaggName>("disagg", config.disagg)?);
    let role = args.role.or(value_of::<RoleName>("role", config.role)?);
    let served = Served {
        disagg: disagg.map_or_else(Disagg::default, Disagg::from),
        policy: args.route_by.map_or_else(Policy::default, Policy::from),
        role: role.map_or_else(NodeRole::default, NodeRole::from),
        keys,
        admin_keys,
        http,
        insecure: args.insecure || config.insecure.unwrap_or(false),
        data: Some(args.data.or(config.data).unwrap_or_else(default_data)),
        kv_host_bytes: size("kv-host-memory", args.kv_host_memory.or(config.kv_host_memory))?,
        kv_disk_bytes: size("kv-disk", args.kv_disk.or(config.kv_disk))?,
        ..Served::new(args.api.or(config.api).unwrap_or(API_DEFAULT), models)
    };
    let advertise = match args.mesh.advertise {
        said if said.is_empty() => config.mesh_address,
        said => said,
    };
    let listen = args.mesh.listen.or(config.mesh);
    let mdns = args.mesh.mdns || config.mdns.unwrap_or(false);
    Ok((served, MeshArgs { listen, advertise, mdns, join: args.mesh.join }, engine))
}

fn size(key: &str, text: Option<String>) -> anyhow::Result<usize> {
    let parse = |t: String| model::parse_size(&t).with_context(|| key.to_owned());
    text.map_or(Ok(0), parse)
}

fn value_of<T: clap::ValueEnum>(key: &str, text: Option<String>) -> anyhow::Result<Option<T>> {
    let parse = |t: String| T::from_str(&t, true).map_err(|e| anyhow::anyhow!("{key}: {e}"));
    text.map(parse).transpose()
}

/// `$XDG_DATA_HOME/grapevine`, else `~/.local/share/grapevine`, else a folder here.
pub fn default_data() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("XDG_DATA_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".local/share")))
        .map_or_else(|| PathBuf::from("grapevine-data"), |base| base.join("grapevine"))
}

/// The key from which tenants' salts are derived: made once, readable by its owner only.
fn node_secret(dir: &Path) -> anyhow::Result<[u8; 32]> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let path = dir.join("secret");
    if !path.exists() {
        // Whole under its name or not at all, also on a disk that is full. A link never replaces a file.
        let unfinished = dir.join(format!("secret.{}.new", std::process::id()));
        let written = write_secret(&unfinished, &random_secret()?);
        let made = written.and_then(|()| std::fs::hard_link(&unfinished, &path));
        let _ = std::fs::remove_file(&unfinished);
        match made {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => made.with_context(|| format!("cannot make {}", path.display()))?,
        }
    }
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    bytes.try_into().map_err(|bytes: Vec<u8>| {
        anyhow::anyhow!(
            "{} has {} bytes instead of 32: it is damaged; remove it to make a new one",
            path.display(),
            bytes.len()
        )
    })
}

fn write_secret(path: &Path, secret: &[u8; 32]) -> std::io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(secret)?;
    file.sync_all()
}

fn random_secret() -> anyhow::Result<[u8; 32]> {
    use std::io::Read;
    let mut secret = [0; 32];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut secret))
        .context("cannot read random numbers from /dev/urandom")?;
    Ok(secret)
}

/// One bar for each model that is being loaded.
#[derive(Clone)]
struct Bars {
    all: MultiProgress,
    visible: bool,
    by_model: Arc<Mutex<BTreeMap<String, ProgressBar>>>,
}

impl Bars {
    fn new(visible: bool) -> Self {
        Bars { all: MultiProgress::new(), visible, by_model: Arc::default() }
    }

    fn set(&self, model: &str, done: f32) {
        if !self.visible {
            return;
        }
        let mut bars = self.by_model.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let bar = bars.entry(model.to_owned()).or_insert_with(|| {
            let style = ProgressStyle::with_template(
                "{prefix:.bold} loading {wide_bar} {percent:>3} %  {elapsed}",
            );
            let bar = self.all.add(ProgressBar::new(1000));
            bar.set_prefix(model.to_owned());
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        bar.set_position((done * 1000.0) as u64);
        if done >= 1.0 {
            bar.finish_and_clear();
        }
    }

    fn clear(&self) {
        let _ = self.all.clear();
    }
}

const API_DEFAULT: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8420);
/// Time for the answer to `vine leave` to be written.
const LEAVE_ANSWER: std::time::Duration = std::time::Duration::from_millis(300);
