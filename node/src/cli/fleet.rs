//! Several nodes on this host, each a process of its own, joined into one mesh by tokens: what
//! `vine demo --nodes N` shows.

use std::fs::{DirBuilder, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::node_record::NodeRole;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::mesh::ask_local;

/// Running nodes and the folder where they keep their state. Dropping it ends them at once.
pub struct Fleet {
    pub nodes: Vec<FleetNode>,
    folder: Folder,
}

/// One process.
pub struct FleetNode {
    /// What people call it.
    pub name: String,
    /// Base URL of its API.
    pub url: String,
    role: NodeRole,
    data: PathBuf,
    process: Child,
}

/// What the nodes do: the first reads prompts for the others, which write.
pub const ROLES: [NodeRole; 2] = [NodeRole::Prefill, NodeRole::Decode];

impl Fleet {
    /// Starts `count` nodes with the built-in model, the first with the first role and all others with
    /// the second. The first listens at `api`, the others take any port; all are one mesh when this
    /// returns.
    pub async fn start(
        api: SocketAddr,
        count: u16,
        [first_role, role]: [NodeRole; 2],
    ) -> anyhow::Result<Fleet> {
        let mut fleet = Fleet { nodes: Vec::new(), folder: Folder::make()? };
        let first = fleet.start_node((1, first_role), api, None).await?;
        fleet.nodes.push(first);
        let body = json!({ "ttl_s": TOKEN_TTL_S, "uses": count - 1, "roles": "all" });
        let made = fleet.ask_first(Method::POST, "/mesh/invite", Some(&body)).await?;
        let token = made["token"].as_str().context("the first node sent no token")?;
        for number in 1..usize::from(count) {
            let any_port = SocketAddr::new(api.ip(), 0);
            let node = fleet.start_node((number + 1, role), any_port, Some(token)).await?;
            fleet.nodes.push(node);
        }
        fleet.wait_until_one().await?;
        Ok(fleet)
    }

    /// The mesh as the first node sees it.
    pub async fn peers(&self) -> anyhow::Result<Value> {
        self.ask_first(Method::GET, "/mesh/peers", None).await
    }

    /// Starts a node again, with what it has kept on disk, and waits until it is back.
    pub async fn restart(&mut self, index: usize) -> anyhow::Result<()> {
        // It may have died already.
        let _ = self.nodes[index].process.kill().await;
        let FleetNode { role, url, .. } = &self.nodes[index];
        let api = url.trim_start_matches("http://").parse::<SocketAddr>()?;
        let again = self.start_node((index + 1, *role), SocketAddr::new(api.ip(), 0), None).await?;
        self.nodes[index] = again;
        self.wait_until_one().await
    }

    /// Waits until a node ends by itself and says which.
    pub async fn any_end(&mut self) -> anyhow::Result<()> {
        let ends = self.nodes.iter_mut().map(|node| Box::pin(node.process.wait()));
        let (status, index, _) = futures_util::future::select_all(ends).await;
        bail!("the node at {} ended: {}", self.nodes[index].url, status?)
    }

    /// Asks all nodes to stop and waits for them; those that do not are killed.
    pub async fn stop(mut self) {
        for node in &self.nodes {
            node.signal(Signal::SIGTERM);
        }
        for node in &mut self.nodes {
            if tokio::time::timeout(STOP_LIMIT, node.process.wait()).await.is_err() {
                let _ = node.process.kill().await;
            }
        }
    }

    async fn start_node(
        &self,
        (number, role): (usize, NodeRole),
        api: SocketAddr,
        token: Option<&str>,
    ) -> anyhow::Result<FleetNode> {
        let data = self.folder.0.join(number.to_string());
        let log = data.with_extension("log");
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["up", "--with-parent", "--threads", "1", "--mesh", "127.0.0.1:0"]);
        command.arg("--api").arg(api.to_string()).arg("--data").arg(&data);
        command.args([
            "--model",
            "demo",
            "--role",
            role.as_str(),
            "--step-pause-ms",
            STEP_PAUSE_MS,
            // A model so small is read as fast at home as elsewhere.
            "--disagg",
            "always",
        ]);
        // The demo is open to whoever uses this host, as it is with one node.
        for variable in ["VINE_JOIN", node::ADMIN_KEY_VARIABLE, "VINE_API_KEY"] {
            command.env_remove(variable);
        }
        if let Some(token) = token {
            command.env("VINE_JOIN", token);
        }
        let mut process = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(OpenOptions::new().create(true).append(true).open(&log)?)
            .kill_on_drop(true)
            .spawn()
            .context("cannot start another process of this program")?;
        let url = tokio::time::timeout(START_LIMIT, read_url(&mut process)).await;
        match url.context("a node did not start in time").flatten() {
            Ok(url) => Ok(FleetNode { name: format!("node {number}"), url, role, data, process }),
            Err(error) => {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                Err(error.context(said.trim().to_owned()))
            }
        }
    }

    /// Waits until each node sees that all of them are there and their models are ready.
    async fn wait_until_one(&self) -> anyhow::Result<()> {
        let begin = std::time::Instant::now();
        while begin.elapsed() < MESH_LIMIT {
            let mut all = true;
            for node in &self.nodes {
                let peers = ask_local(&node.data, Method::GET, "/mesh/peers", None).await?;
                let members = peers["peers"].as_array().map_or(&[][..], Vec::as_slice);
                let is_ready = |m: &&Value| {
                    let models = m["models"].as_array().map_or(&[][..], Vec::as_slice);
                    m["state"] == "alive" && models.iter().any(|model| model["state"] == "ready")
                };
                all &= members.iter().filter(is_ready).count() == self.nodes.len();
            }
            if all {
                return Ok(());
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        bail!("the nodes did not become one mesh within {} s", MESH_LIMIT.as_secs())
    }

    async fn ask_first(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        ask_local(&self.nodes[0].data, method, path, body).await
    }
}

impl FleetNode {
    /// What it does, in words.
    pub fn what(&self) -> &'static str {
        match self.role {
            NodeRole::Prefill => "to read prompts for the others",
            NodeRole::Decode => "to write answers",
            NodeRole::Both => "to do whatever is needed",
        }
    }

    /// As if its host had lost power.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    fn signal(&self, signal: Signal) {
        if let Some(id) = self.process.id() {
            // It may be gone already.
            let _ = kill(Pid::from_raw(id.cast_signed()), signal);
        }
    }
}

/// Reads what `vine up` prints until it says where it serves; the rest is read and dropped.
async fn read_url(process: &mut Child) -> anyhow::Result<String> {
    let out = process.stdout.take().context("no output")?;
    let mut lines = BufReader::new(out).lines();
    while let Some(line) = lines.next_line().await? {
        if let Some(at) = line.find("http://") {
            let url = line[at..].trim_end_matches("/v1").to_owned();
            tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
            return Ok(url);
        }
    }
    bail!("a node ended while it started")
}

/// A folder of this process alone, removed with it.
struct Folder(PathBuf);

impl Folder {
    fn make() -> anyhow::Result<Folder> {
        let path = std::env::temp_dir().join(format!("grapevine-demo-{}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The built-in model is done in a moment; with this people can read along.
const STEP_PAUSE_MS: &str = "15";
const TOKEN_TTL_S: u64 = 600;
const START_LIMIT: Duration = Duration::from_secs(60);
const MESH_LIMIT: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Longer than a node takes to say farewell; the demo's answers are short.
const STOP_LIMIT: Duration = Duration::from_secs(10);
