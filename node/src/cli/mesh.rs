//! `vine invite`, `revoke`, `authority`, `leave`, and the mesh of `vine up`: the local node, asked over
//! its Unix socket, or another one over its API.

use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use node::mesh::{
    CONTROL_SOCKET, ControlRoutes, ControlServer, IdentityError, LinkError, Mesh, MeshError,
    MeshOptions, Roster, StoreError,
};
use protocol::identity::{Invite, UnixTime};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::client::Client;
use super::up::default_data;

/// Which node is asked: the one on this host that has this data directory, or another one.
#[derive(Debug, Clone, Args)]
pub struct AskedNodeArgs {
    /// Data directory of the running node.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Ask this node over its API, as http://HOST:8420; it wants one of its admin keys.
    #[arg(long = "node", value_name = "URL", conflicts_with = "data", requires = "key")]
    pub url: Option<String>,
    /// Admin key for --node.
    #[arg(long, env = "VINE_ADMIN_KEY", hide_env_values = true, value_name = "KEY")]
    pub key: Option<String>,
    /// One JSON object instead of text.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct InviteArgs {
    /// How long the token can be used, as 30m, 24h or 7d.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = seconds)]
    pub ttl: u64,
    /// How many nodes can join with it.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub uses: u16,
    /// What they may do: compute, ingress, authority, or all.
    #[arg(long, value_name = "ROLES", default_value = "all")]
    pub roles: String,
    /// Where the new node dials first; default: this node and the other authorities. Repeat it for more.
    #[arg(long = "seed", value_name = "ADDR")]
    pub seeds: Vec<SocketAddr>,
    #[command(flatten)]
    pub node: AskedNodeArgs,
}

#[derive(Debug, Args)]
pub struct RevokeArgs {
    /// The node's id, or the beginning of it.
    #[arg(value_name = "NODE")]
    pub revoked: String,
    /// Take an earlier revocation back.
    #[arg(long)]
    pub undo: bool,
    #[command(flatten)]
    pub node: AskedNodeArgs,
}

#[derive(Debug, Args)]
pub struct LeaveArgs {
    #[command(flatten)]
    pub node: AskedNodeArgs,
}

#[derive(Debug, Args)]
pub struct AuthorityArgs {
    /// Make this node an authority: its id, or the beginning of it.
    #[arg(long, value_name = "NODE")]
    pub add: Vec<String>,
    /// Take authority away from this node.
    #[arg(long, value_name = "NODE")]
    pub remove: Vec<String>,
    #[command(flatten)]
    pub node: AskedNodeArgs,
}

/// How `vine up` takes part in a mesh.
#[derive(Debug, Clone, Default, Args)]
pub struct MeshArgs {
    /// UDP address for other nodes; default: port 8421 on loopback, where no other host can reach it.
    #[arg(long = "mesh", value_name = "ADDR", help_heading = "Mesh")]
    pub listen: Option<SocketAddr>,
    /// Where other nodes reach this one, if not at --mesh. Repeat it for more.
    #[arg(long = "mesh-address", value_name = "ADDR", help_heading = "Mesh")]
    pub advertise: Vec<SocketAddr>,
    /// Find members on the local network, and be found there, by multicast DNS. It tells everybody on
    /// that network that this node exists.
    #[arg(long, help_heading = "Mesh")]
    pub mdns: bool,
    /// Join a mesh: the token that `vine invite` printed. Needed once; afterwards the node is a member.
    #[arg(
        long,
        env = "VINE_JOIN",
        hide_env_values = true,
        value_name = "TOKEN",
        help_heading = "Mesh"
    )]
    pub join: Option<String>,
}

impl MeshArgs {
    pub fn is_asked_for(&self) -> bool {
        self.listen.is_some() || self.join.is_some() || !self.advertise.is_empty()
    }
}

/// A member and its socket for the command line.
pub struct Running {
    pub mesh: Mesh,
    pub roster: Arc<Roster>,
    pub routes: ControlRoutes,
    /// Cancelled when the node has left its mesh.
    pub left: CancellationToken,
    _control: ControlServer,
}

/// Starts the mesh of `vine up`. Without any of its flags, what stands in its way is logged and the node
/// runs without a mesh, as nodes did before there were any.
pub async fn start(args: &MeshArgs, data: &Path) -> anyhow::Result<Option<Running>> {
    match try_start(args, data).await {
        Ok(running) => Ok(Some(running)),
        Err(error) if args.is_asked_for() => Err(error),
        Err(error) => {
            let in_use = error.downcast_ref::<MeshError>().is_some_and(|e| {
                matches!(e, MeshError::Identity(IdentityError::Store(StoreError::InUse { .. })))
            });
            if in_use {
                tracing::warn!("another node has this data directory: this one is in no mesh");
                return Ok(None);
            }
            Err(error)
        }
    }
}

async fn try_start(args: &MeshArgs, data: &Path) -> anyhow::Result<Running> {
    let token = args.join.as_deref().map(str::parse::<Invite>).transpose().context("--join")?;
    let roster = Roster::new();
    let options = |listen| MeshOptions {
        service: roster.clone(),
        token: token.clone(),
        mdns: args.mdns,
        advertise: args.advertise.clone(),
        ..MeshOptions::new(data, listen)
    };
    let started = Mesh::start(options(args.listen.unwrap_or(MESH_DEFAULT))).await;
    let mesh = match started {
        // A second node on this host takes any port, unless one was asked for.
        Err(MeshError::Link(LinkError::Listen { .. })) if args.listen.is_none() => {
            Mesh::start(options(SocketAddr::new(MESH_DEFAULT.ip(), 0))).await?
        }
        started => started?,
    };
    let left = CancellationToken::new();
    let routes = ControlRoutes::new(mesh.clone(), roster.clone(), left.clone());
    let control = ControlServer::start(data, routes.clone())
        .with_context(|| format!("cannot make {}", data.join(CONTROL_SOCKET).display()))?;
    Ok(Running { mesh, roster, routes, left, _control: control })
}

/// What `vine up` says of its mesh.
pub fn line(mesh: &Mesh) -> String {
    let of = mesh.standing().map_or_else(String::new, |s| s.trust.mesh().short());
    format!("node {} of mesh {of}, listening for nodes at {}", mesh.node().short(), mesh.address())
}

pub async fn invite(args: &InviteArgs) -> anyhow::Result<()> {
    let InviteArgs { ttl, uses, roles, seeds, node } = args;
    let body = json!({ "ttl_s": ttl, "uses": uses, "roles": roles, "seeds": seeds });
    let made = ask(node, Method::POST, "/mesh/invite", Some(&body)).await?;
    if node.json {
        println!("{made}");
        return Ok(());
    }
    let token = made["token"].as_str().context("the node sent no token")?;
    println!("{token}");
    if std::io::stdout().is_terminal() {
        let until = UnixTime(made["expires"].as_u64().unwrap_or(0));
        println!("\nOn the other host, until {until}, for {uses} node(s):\n");
        println!("  vine up --mesh ADDR --model SPEC --join {}…", &token[..16]);
    }
    let loopback = |a: &Value| {
        a.as_str().and_then(|a| a.parse::<SocketAddr>().ok()).is_some_and(|a| a.ip().is_loopback())
    };
    if made["seeds"].as_array().is_some_and(|seeds| seeds.iter().all(loopback)) {
        eprintln!(
            "note: this node listens on loopback only, so the token works on this host only; start \
             it with --mesh ADDR to let others in"
        );
    }
    Ok(())
}

pub async fn revoke(args: &RevokeArgs) -> anyhow::Result<()> {
    let body = json!({ "node": args.revoked, "undo": args.undo });
    let done = ask(&args.node, Method::POST, "/mesh/revoke", Some(&body)).await?;
    let node = done["node"].as_str().unwrap_or_default();
    match (args.node.json, args.undo) {
        (true, _) => println!("{done}"),
        (false, false) => println!("{node} is revoked: its connections are closed"),
        (false, true) => println!("{node} may be a member again"),
    }
    Ok(())
}

pub async fn leave(args: &LeaveArgs) -> anyhow::Result<()> {
    let done = ask(&args.node, Method::POST, "/mesh/leave", Some(&json!({}))).await?;
    match args.node.json {
        true => println!("{done}"),
        false => println!(
            "left mesh {}; the node stops",
            done["left"].as_str().unwrap_or_default().get(..8).unwrap_or_default()
        ),
    }
    Ok(())
}

pub async fn authority(args: &AuthorityArgs) -> anyhow::Result<()> {
    let AuthorityArgs { add, remove, node } = args;
    let status = match add.is_empty() && remove.is_empty() {
        true => ask(node, Method::GET, "/mesh", None).await?,
        false => {
            let body = json!({ "add": add, "remove": remove });
            ask(node, Method::POST, "/mesh/authority", Some(&body)).await?
        }
    };
    let authority = &status["authority"];
    if node.json {
        println!("{authority}");
        return Ok(());
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    println!("mesh {}, authority epoch {}", text(&status["mesh"]), authority["epoch"]);
    for member in authority["nodes"].as_array().into_iter().flatten() {
        let here = if *member == status["node"] { "  (this node)" } else { "" };
        println!("{}{here}", text(member));
    }
    let expires = UnixTime(authority["expires"].as_u64().unwrap_or(0));
    println!("until {expires}, renewed before by any of them");
    if authority["root_key_here"] == json!(true) {
        println!("the mesh's root key is on this host: keep a copy somewhere safe");
    }
    Ok(())
}

/// Asks the node.
pub async fn ask(
    node: &AskedNodeArgs,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<Value> {
    match &node.url {
        Some(url) => {
            let client = Client::new(url, node.key.clone())?;
            tokio::time::timeout(ANSWER_TIMEOUT, client.call(method, path, body))
                .await
                .with_context(|| {
                    format!("{url} did not answer within {} s", ANSWER_TIMEOUT.as_secs())
                })?
        }
        None => {
            ask_local(&node.data.clone().unwrap_or_else(default_data), method, path, body).await
        }
    }
}

/// Asks the node on this host whose data directory this is.
pub async fn ask_local(
    data: &Path,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<Value> {
    let socket = data.join(CONTROL_SOCKET);
    let stream = tokio::net::UnixStream::connect(&socket).await.with_context(|| {
        format!("no node answers at {}: is one running? (`vine up`, --data)", socket.display())
    })?;
    let asking = async {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let bytes = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(bytes)))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        anyhow::Ok((status, body))
    };
    let (status, body) =
        tokio::time::timeout(ANSWER_TIMEOUT, asking).await.with_context(|| {
            format!("the node did not answer within {} s", ANSWER_TIMEOUT.as_secs())
        })??;
    let value: Value = serde_json::from_slice(&body)
        .unwrap_or_else(|_| json!({ "error": { "message": String::from_utf8_lossy(&body) } }));
    match (status, value["error"]["message"].as_str()) {
        (StatusCode::OK, _) => Ok(value),
        (_, Some(message)) => bail!("{message}"),
        (status, None) => bail!("the node answered {status}"),
    }
}

/// `90s`, `30m`, `24h`, `7d`.
fn seconds(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[number.len()..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err("a time is a number with s, m, h or d, as 24h".to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| format!("{number:?} is no number"))?;
    match number.checked_mul(unit) {
        Some(seconds) if (1..=TTL_MAX_S).contains(&seconds) => Ok(seconds),
        _ => Err("a token lives from 1s to 365d".to_owned()),
    }
}

const MESH_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8421);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
const TTL_MAX_S: u64 = 365 * 86_400;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, expected) in
            [("90s", Some(90)), ("30m", Some(1800)), ("24h", Some(86_400)), ("7d", Some(604_800))]
        {
            assert_eq!(seconds(text).ok(), expected, "{text}");
        }
        for bad in ["", "5", "h", "0h", "1w", "-1h", "366d", "99999999999999999999s", "1é"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
