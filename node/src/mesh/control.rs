//! What the command line asks a node: JSON over HTTP. On the same host over a Unix socket, for whoever
//! may open the file (mode 0600); from elsewhere over the API, with an admin key.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use protocol::NodeId;
use protocol::api::Explanation;
use protocol::identity::{INVITE_SEEDS_MAX, Roles};
use protocol::membership::MemberState;
use protocol::node_record::{ReplicaRecord, ReplicaState};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::connections::blocking;
use super::identity::{IdentityError, Standing};
use super::overlay::{Nat, OverlayStatus, Path};
use super::roster::{PeerLine, Roster};
use super::running::Mesh;

/// The socket's name under the data directory.
pub const CONTROL_SOCKET: &str = "vine.sock";

/// The running server; dropping it removes the socket.
pub struct ControlServer {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl ControlServer {
    /// Listens at `data/vine.sock`. A socket that a dead node left is replaced: the caller holds the
    /// lock of the data directory, so that no living node has it.
    ///
    /// # Errors
    /// If the socket cannot be made (its path may be longer than the 107 bytes that Unix allows).
    pub fn start(data: &std::path::Path, routes: ControlRoutes) -> std::io::Result<ControlServer> {
        let path = data.join(CONTROL_SOCKET);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Made under a name that nobody knows and opened to its owner only before it gets its own.
        let unfinished = data.join(format!("{CONTROL_SOCKET}.{}", std::process::id()));
        let listener = UnixListener::bind(&unfinished)?;
        std::fs::set_permissions(&unfinished, PermissionsExt::from_mode(0o600))?;
        std::fs::rename(&unfinished, &path)?;
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, routes.0).await {
                tracing::error!(%error, "the control socket is closed");
            }
        });
        Ok(ControlServer { path, task })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What can be asked of a running node, whoever asks: who may is decided where they are served.
#[derive(Clone)]
pub struct ControlRoutes(pub(crate) Router);

impl ControlRoutes {
    /// `left` is cancelled when the node has left its mesh.
    pub fn new(mesh: Mesh, roster: Arc<Roster>, left: CancellationToken) -> ControlRoutes {
        let routes = Router::new()
            .route("/mesh", get(status))
            .route("/mesh/peers", get(peers))
            .route("/mesh/invite", post(invite))
            .route("/mesh/revoke", post(revoke))
            .route("/mesh/authority", post(authority))
            .route("/mesh/leave", post(leave))
            .route("/admin/v1/requests/{request}/explain", get(explain));
        ControlRoutes(routes.with_state(Control { mesh, roster, left }))
    }
}

#[derive(Clone)]
struct Control {
    mesh: Mesh,
    roster: Arc<Roster>,
    left: CancellationToken,
}

/// An answer other than 200.
struct Failure(StatusCode, String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Failure(status, message) = self;
        (status, Json(json!({ "error": { "message": message } }))).into_response()
    }
}

impl From<IdentityError> for Failure {
    fn from(error: IdentityError) -> Self {
        let status = match error {
            IdentityError::Store(_) | IdentityError::Key(_) => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::CONFLICT,
        };
        Failure(status, super::connections::chain_text(&error))
    }
}

type Answer = Result<Json<Value>, Failure>;

#[derive(Deserialize)]
struct InviteBody {
    ttl_s: u64,
    uses: u16,
    roles: String,
    #[serde(default)]
    seeds: Vec<SocketAddr>,
}

#[derive(Deserialize)]
struct RevokeBody {
    node: String,
    /// Take an earlier revocation back.
    #[serde(default)]
    undo: bool,
}

#[derive(Deserialize)]
struct AuthorityBody {
    #[serde(default)]
    add: Vec<String>,
    #[serde(default)]
    remove: Vec<String>,
}

async fn status(State(Control { mesh, roster, .. }): State<Control>) -> Answer {
    let standing = standing(&mesh)?;
    let body = &standing.certificate.body;
    let trust = &standing.trust;
    let revoked: Vec<Value> = trust
        .revocations()
        .iter()
        .filter(|e| e.body.revoked)
        .map(|e| json!({ "node": e.body.node.to_string(), "at": e.body.issued_at.0 }))
        .collect();
    let peers: Vec<Value> = mesh
        .peers()
        .iter()
        .map(|(node, address, rtt)| {
            let rtt_ms = rtt.as_secs_f64() * 1e3;
            json!({ "node": node.to_string(), "address": address, "rtt_ms": rtt_ms })
        })
        .collect();
    let head = &trust.chain().head().body;
    Ok(Json(json!({
        "mesh": trust.mesh().to_string(),
        "node": mesh.node().to_string(),
        "addresses": mesh.contact().addresses,
        "certificate": {
            "serial": format!("{:016x}", body.serial),
            "roles": body.roles.to_string(),
            "issuer": standing.certificate.signer.to_string(),
            "expires": body.expires.0,
            "renews": body.renew_at().0,
        },
        "authority": {
            "epoch": trust.epoch(),
            "nodes": head.members.iter().map(NodeId::to_string).collect::<Vec<_>>(),
            "expires": head.expires.0,
            "this_node": mesh.identity().is_authority(),
            "root_key_here": mesh.identity().has_root(),
        },
        "revoked": revoked,
        "peers": peers,
        "overlay": roster.overlay().map(|status| overlay(&status)),
    })))
}

fn overlay(status: &OverlayStatus) -> Value {
    let nat = match status.nat {
        Nat::Unknown => "unknown",
        Nat::Public => "public",
        Nat::Private => "private",
    };
    let count = |path| status.peers.iter().filter(|peer| peer.path == path).count();
    json!({
        "nat": nat,
        "listening": status.listening,
        "external": status.external.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "relays": status.relays.iter().map(NodeId::to_string).collect::<Vec<_>>(),
        "direct": count(Path::Direct),
        "relayed": count(Path::Relayed),
        "restarts": status.restarts,
    })
}

/// Every member, this node first.
async fn peers(State(Control { roster, .. }): State<Control>) -> Answer {
    let peers: Vec<Value> = roster.peers().await.iter().map(peer).collect();
    Ok(Json(json!({ "peers": peers })))
}

fn peer(line: &PeerLine) -> Value {
    let PeerLine { member, record, record_age, own, connected, carried, overlay } = line;
    let record = record.as_ref();
    let state = match member.state {
        MemberState::Alive => "alive",
        MemberState::Suspect => "suspect",
        MemberState::Dead => "dead",
        MemberState::Left => "left",
    };
    let replica = |r: &ReplicaRecord| {
        let state = match r.state {
            ReplicaState::Loading => "loading",
            ReplicaState::Ready => "ready",
            ReplicaState::Failed => "failed",
        };
        json!({
            "model": r.model, "fingerprint": r.fingerprint, "state": state,
            "context_tokens_max": r.context_tokens_max, "running": r.running, "waiting": r.waiting,
            "prompt_tokens": r.prompt_tokens, "prefill_rate": r.prefill_rate,
            "kv_blocks_free": r.kv_blocks_free, "kv_blocks": r.kv_blocks,
            "decode_step_us": r.decode_step_us, "kv_bytes_per_token": r.kv_bytes_per_token,
        })
    };
    json!({
        "node": member.node.to_string(),
        "this_node": own,
        "name": record.map(|r| r.name.as_str()),
        "addresses": member.addresses,
        "state": state,
        "state_s": member.age.as_secs_f64(),
        "incarnation": member.incarnation,
        "rtt_ms": member.rtt.map(|rtt| rtt.as_secs_f64() * 1e3),
        "version": record.map(|r| r.version.as_str()),
        "draining": record.map(|r| r.draining),
        "role": record.map(|r| r.role.as_str()),
        "memory_bytes_per_s": record.map(|r| r.memory_bytes_per_s),
        "int8_ops_per_s": record.map(|r| r.int8_ops_per_s),
        "models": record.map(|r| r.replicas.iter().map(replica).collect::<Vec<_>>()),
        "connected": connected,
        "carried": carried,
        "overlay": overlay.map(|path| match path {
            Path::Direct => "direct",
            Path::Relayed => "relayed",
        }),
        "record_age_s": record_age.map(|age| age.as_secs_f64()),
    })
}

async fn invite(
    State(Control { mesh, .. }): State<Control>,
    Json(body): Json<InviteBody>,
) -> Answer {
    let InviteBody { ttl_s, uses, roles, seeds } = body;
    let roles: Roles = roles.parse().map_err(|e: protocol::identity::RolesError| bad(&e))?;
    let mut seeds = if seeds.is_empty() { known_seeds(&mesh) } else { seeds };
    seeds.truncate(INVITE_SEEDS_MAX);
    if let Some(any) = seeds.iter().find(|s| s.ip().is_unspecified() || s.port() == 0) {
        return Err(bad(&format!(
            "{any} is no address that another host can dial: start the node with --mesh-address, or \
             name one with --seed"
        )));
    }
    let identity = mesh.identity().clone();
    let made = blocking(move || identity.invite((roles, uses, ttl_s), seeds)).await?;
    let record = &made.record.body;
    Ok(Json(json!({
        "token": made.to_string(),
        "id": made.id().to_string(),
        "mesh": made.mesh().to_string(),
        "roles": record.roles.to_string(),
        "uses": record.uses,
        "expires": record.expires.0,
        "seeds": made.seeds,
    })))
}

/// This node first, then other authorities, so that a token works while one of them lives.
fn known_seeds(mesh: &Mesh) -> Vec<SocketAddr> {
    let mut seeds: Vec<SocketAddr> = mesh.contact().addresses.iter().copied().take(2).collect();
    if let Some(Standing { trust, .. }) = mesh.standing() {
        let contacts = mesh.identity().contacts(None);
        let others = contacts.iter().filter(|c| trust.is_authority(c.node));
        seeds.extend(others.filter_map(|c| c.addresses.first()));
    }
    seeds
}

async fn revoke(
    State(Control { mesh, .. }): State<Control>,
    Json(body): Json<RevokeBody>,
) -> Answer {
    let node = find(&mesh, &body.node)?;
    if node == mesh.node() {
        return Err(bad(&"a node cannot revoke itself: `vine leave`, or ask another authority"));
    }
    let identity = mesh.identity().clone();
    blocking(move || identity.revoke(node, !body.undo)).await?;
    mesh.tell_news();
    Ok(Json(json!({ "node": node.to_string(), "revoked": !body.undo })))
}

async fn authority(
    State(control): State<Control>,
    Json(AuthorityBody { add, remove }): Json<AuthorityBody>,
) -> Answer {
    let mesh = &control.mesh;
    let nodes = |names: &[String]| {
        names.iter().map(|name| find(mesh, name)).collect::<Result<Vec<NodeId>, Failure>>()
    };
    let (add, remove) = (nodes(&add)?, nodes(&remove)?);
    let identity = mesh.identity().clone();
    blocking(move || identity.change_authorities(&add, &remove)).await?;
    mesh.tell_news();
    status(State(control)).await
}

/// Why a request went where it went; `latest` is the last one that was decided about.
async fn explain(
    State(Control { roster, .. }): State<Control>,
    UrlPath(request): UrlPath<String>,
) -> Result<Json<Explanation>, Failure> {
    let request = match request.as_str() {
        "latest" => None,
        id => Some(id.parse().map_err(|_| bad(&"a request's id is what `x-request-id` says"))?),
    };
    let unknown = || {
        let message = "this node has decided nothing about it, or does not remember it: it keeps its \
                       last few thousand decisions. Ask the node that the client has asked";
        Failure(StatusCode::NOT_FOUND, message.to_owned())
    };
    roster.explain(request).map(Json).ok_or_else(unknown)
}

async fn leave(State(Control { mesh, left, .. }): State<Control>) -> Answer {
    let former = standing(&mesh)?.trust.mesh();
    let (node, was_last) = (mesh.node(), {
        let Standing { trust, .. } = standing(&mesh)?;
        trust.authorities() == [mesh.node()] && !mesh.peers().is_empty()
    });
    if was_last {
        return Err(bad(
            &"this is the last authority: make another node one first (`vine authority --add NODE`)",
        ));
    }
    mesh.leave().await?;
    left.cancel();
    Ok(Json(json!({ "left": former.to_string(), "node": node.to_string() })))
}

fn standing(mesh: &Mesh) -> Result<Standing, Failure> {
    mesh.standing().ok_or_else(|| IdentityError::NoMesh.into())
}

fn bad(why: &dyn std::fmt::Display) -> Failure {
    Failure(StatusCode::BAD_REQUEST, why.to_string())
}

/// A node by its id, or by the beginning of it if only one known node has that.
fn find(mesh: &Mesh, name: &str) -> Result<NodeId, Failure> {
    if let Ok(node) = name.parse() {
        return Ok(node);
    }
    let name = name.to_ascii_lowercase();
    let standing = standing(mesh)?;
    let mut known: Vec<NodeId> = mesh.identity().contacts(None).iter().map(|c| c.node).collect();
    known.extend(mesh.peers().iter().map(|(node, ..)| *node));
    known.extend(standing.trust.authorities());
    known.extend(standing.trust.revocations().iter().map(|e| e.body.node));
    known.push(mesh.node());
    known.retain(|node| name.len() >= NAME_CHARS_MIN && node.to_string().starts_with(&name));
    known.sort_unstable();
    known.dedup();
    match known[..] {
        [node] => Ok(node),
        [] => Err(bad(&format!("no known node's id begins with {name:?}: give the whole id"))),
        _ => Err(bad(&format!("several nodes' ids begin with {name:?}: give the whole id"))),
    }
}

/// Too few letters name a node by accident.
const NAME_CHARS_MIN: usize = 4;
