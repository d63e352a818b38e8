//! A node from start to stop.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use protocol::node_record::NodeRole;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::accept;
use crate::http::{self, App};
use crate::ids::RequestIds;
use crate::kv::KvPlane;
use crate::load;
use crate::measured::{self, Host};
use crate::mesh::{MembersError, Mesh, Roster};
use crate::metrics::Metrics;
use crate::options::NodeOptions;
use crate::registry::Registry;

/// Why a node did not start. Nothing is left running.
#[derive(Debug, Error)]
pub enum ServeError {
    #[error(
        "{address} can be reached by other machines: configure API keys, listen on 127.0.0.1, or \
         say --insecure"
    )]
    Unprotected { address: SocketAddr },
    #[error("no model is given: name at least one")]
    NoModel,
    #[error("two models are called {0:?}: give one of them another name (name=…)")]
    DuplicateModel(String),
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("the metrics recorder cannot be made")]
    Metrics(#[from] metrics_exporter_prometheus::BuildError),
}

/// Models that could not be loaded, and why.
#[derive(Debug, Error)]
#[error("{}", .0.iter().map(|(id, why)| format!("model {id}: {why}")).collect::<Vec<_>>().join("; "))]
pub struct LoadFailed(pub Vec<(String, String)>);

/// A running node. Dropping it stops it at once.
pub struct Node {
    address: SocketAddr,
    pub(crate) app: Arc<App>,
    connections: Option<JoinHandle<()>>,
    drain_limit: Duration,
}

/// Starts a node: binds its address, answers at once, loads its models in the background.
pub async fn serve(options: NodeOptions) -> Result<Node, ServeError> {
    if options.models.is_empty() && !options.without_models {
        return Err(ServeError::NoModel);
    }
    for (i, model) in options.models.iter().enumerate() {
        if options.models[..i].iter().any(|m| m.id == model.id) {
            return Err(ServeError::DuplicateModel(model.id.clone()));
        }
    }
    let address = options.listen;
    let loopback = address.ip().is_loopback();
    if !loopback && options.keys.is_empty() && !options.insecure {
        return Err(ServeError::Unprotected { address });
    }
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| ServeError::Listen { address, source })?;
    let address = listener.local_addr().map_err(|source| ServeError::Listen { address, source })?;

    let (control, admin_keys) = options.admin.unzip();
    let metrics = Arc::new(Metrics::new()?);
    let registry = Arc::new(Registry::new(options.models.iter().map(|m| m.id.clone())));
    let stop = CancellationToken::new();
    let kv = KvPlane::new(options.role != NodeRole::Decode, stop.clone());
    let app = Arc::new(App {
        listen: address,
        registry: registry.clone(),
        kv: kv.clone(),
        metrics: metrics.clone(),
        check_host: loopback && options.keys.is_empty(),
        keys: options.keys,
        admin_keys: admin_keys.unwrap_or_default(),
        limits: options.http.clone(),
        role: options.role,
        disagg: options.disagg,
        policy: options.policy,
        ids: RequestIds::new(),
        roster: OnceLock::new(),
        measured: OnceLock::new(),
        running: TaskTracker::new(),
        drain: CancellationToken::new(),
        cancel: CancellationToken::new(),
        stop,
    });
    load::spawn(options.models, (registry, metrics, kv), options.on_progress);
    let router = http::router(app.clone(), control);
    let write_timeouts = app.metrics.write_timeouts();
    let serving = accept::serve(listener, router, options.http, write_timeouts, app.stop.clone());
    let connections = tokio::spawn(serving);
    tracing::info!(%address, keys = app.keys.len(), "listening");
    Ok(Node { address, app, connections: Some(connections), drain_limit: options.drain_limit })
}

impl Node {
    /// Where it listens; the port is real where 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Base URL of the API, without `/v1`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Takes part in a mesh: its nodes hear of this one's models and this one answers for theirs.
    /// `roster` is the service that `mesh` was started with; `data` keeps what must survive.
    ///
    /// # Errors
    /// If membership cannot begin; the node goes on alone.
    pub fn join(&self, mesh: Mesh, roster: Arc<Roster>, data: &Path) -> Result<(), MembersError> {
        roster.start(mesh, data, self.app.clone())?;
        self.app.kv.join(&roster);
        let (shown, kv) = (roster.clone(), self.app.kv.clone());
        self.app.metrics.add_source(Box::new(move || shown.samples()));
        self.app.metrics.add_source(Box::new(move || kv.samples()));
        let _ = self.app.roster.set(roster);
        Ok(())
    }

    /// Measures the host's memory and arithmetic for the node record while nothing runs, and keeps the
    /// result in `file`.
    pub fn measure_when_idle(&self, file: PathBuf, host: Host) {
        tokio::spawn(measured::measure_when_idle(self.app.clone(), file, host));
    }

    /// Waits until every model is loaded and has made a step, or has failed to.
    pub async fn ready(&self) -> Result<(), LoadFailed> {
        match self.app.registry.loaded().await {
            failed if failed.is_empty() => Ok(()),
            failed => Err(LoadFailed(failed)),
        }
    }

    /// Stops gently: new work is refused with 503 and `/readyz` says so at once; running answers go on
    /// for at most the drain limit and break off with an error event after it; then the listener and
    /// the connections close.
    pub async fn shutdown(mut self) {
        let Some(mut connections) = self.connections.take() else { return };
        let app = &self.app;
        app.drain.cancel();
        app.running.close();
        app.kv.leave().await;
        if let Some(roster) = app.roster.get() {
            roster.leave().await;
        }
        tracing::info!(running = app.running.len(), "draining");
        if tokio::time::timeout(self.drain_limit, app.running.wait()).await.is_err() {
            tracing::warn!(running = app.running.len(), "the drain limit has passed: breaking off");
        }
        app.cancel.cancel();
        app.stop.cancel();
        if tokio::time::timeout(CLOSE_LIMIT, &mut connections).await.is_err() {
            tracing::warn!("some connections did not close in time and are cut");
            connections.abort();
        }
        tracing::info!("stopped");
    }

    /// Serves until SIGINT or SIGTERM, then shuts down; a second signal stops it at once.
    pub async fn run_until_signal(self) -> std::io::Result<()> {
        shutdown_signal().await?;
        tokio::select! {
            () = self.shutdown() => Ok(()),
            second = shutdown_signal() => second,
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.app.drain.cancel();
        self.app.cancel.cancel();
        self.app.stop.cancel();
        if let Some(connections) = &self.connections {
            connections.abort();
        }
    }
}

/// Waits for SIGINT or SIGTERM.
pub async fn shutdown_signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}

/// Time for connections to close, and for broken-off streams to send their last event.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
