//! Nodes on free loopback ports, with clocks that tests set.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use node::mesh::{Clock, ECHO, Mesh, MeshError, MeshLimits, MeshOptions, PeerEvent, Service};
use protocol::NodeId;
use protocol::identity::{Invite, Roles, UnixTime};
use tempfile::TempDir;

pub const HOUR: u64 = 3600;
pub const START: u64 = 1_800_000_000;

/// A clock of all nodes of a test.
#[derive(Clone)]
pub struct TestClock(Arc<AtomicU64>);

impl TestClock {
    pub fn new() -> Self {
        TestClock(Arc::new(AtomicU64::new(START)))
    }

    /// As nodes take it.
    pub fn clock(&self) -> Clock {
        let now = self.0.clone();
        Arc::new(move || UnixTime(now.load(Ordering::SeqCst)))
    }

    pub fn advance(&self, seconds: u64) {
        self.0.fetch_add(seconds, Ordering::SeqCst);
    }
}

/// What members sent and did.
#[derive(Default)]
pub struct Heard {
    pub datagrams: Mutex<Vec<(NodeId, Bytes)>>,
    pub events: Mutex<Vec<PeerEvent>>,
}

impl Service for Heard {
    fn datagram(&self, from: NodeId, bytes: Bytes) {
        self.datagrams.lock().unwrap().push((from, bytes));
    }

    fn event(&self, event: PeerEvent) {
        self.events.lock().unwrap().push(event);
    }
}

/// A node that can be stopped and started again.
pub struct TestNode {
    pub mesh: Mesh,
    pub heard: Arc<Heard>,
    pub data: TempDir,
    clock: TestClock,
}

/// Bounds that tests reach quickly.
pub fn limits() -> MeshLimits {
    MeshLimits {
        handshake_timeout: Duration::from_secs(3),
        stream_timeout: Duration::from_secs(1),
        dial_backoff: (Duration::from_millis(50), Duration::from_millis(500)),
        ban: Duration::from_secs(3),
        join_burst: 64,
        ..MeshLimits::default()
    }
}

pub async fn start_at(
    data: &Path,
    token: Option<&str>,
    clock: &TestClock,
    limits: MeshLimits,
) -> Result<(Mesh, Arc<Heard>), MeshError> {
    let heard = Arc::new(Heard::default());
    let options = MeshOptions {
        token: token.map(|t| t.parse::<Invite>().unwrap()),
        limits,
        clock: clock.clock(),
        service: heard.clone(),
        ..MeshOptions::new(data, loopback())
    };
    Mesh::start(options).await.map(|mesh| (mesh, heard))
}

impl TestNode {
    pub async fn start(token: Option<&str>, clock: &TestClock) -> TestNode {
        TestNode::start_with(token, clock, limits()).await
    }

    pub async fn start_with(
        token: Option<&str>,
        clock: &TestClock,
        limits: MeshLimits,
    ) -> TestNode {
        let data = tempfile::tempdir().unwrap();
        let (mesh, heard) = start_at(data.path(), token, clock, limits).await.unwrap();
        TestNode { mesh, heard, data, clock: clock.clone() }
    }

    /// Stops it and starts it again from its data directory, without a token.
    pub async fn restart(self) -> TestNode {
        let TestNode { mesh, data, clock, .. } = self;
        let node = mesh.node();
        mesh.shutdown().await;
        drop(mesh);
        let (mesh, heard) = start_at(data.path(), None, &clock, limits()).await.unwrap();
        assert_eq!(mesh.node(), node, "a node keeps its key");
        TestNode { mesh, heard, data, clock }
    }

    pub fn id(&self) -> NodeId {
        self.mesh.node()
    }

    pub fn token(&self, uses: u16) -> String {
        let grant = (Roles::ALL, uses, HOUR);
        let invite = self.mesh.identity().invite(grant, vec![self.mesh.address()]).unwrap();
        invite.to_string()
    }

    /// Whether a call to `other` comes back.
    pub async fn reaches(&self, other: &TestNode) -> bool {
        let body = b"over the wire".to_vec();
        let within = Duration::from_secs(5);
        self.mesh.call(other.id(), ECHO, body.clone(), within).await.is_ok_and(|b| b == body)
    }

    pub async fn connected(&self, other: &TestNode) {
        let to = other.id();
        until("connected", || self.mesh.peers().iter().any(|(node, ..)| *node == to)).await;
    }

    /// The counter of that name.
    pub fn count(&self, name: &str) -> u64 {
        let all = self.mesh.counters().all();
        let name = format!("grapevine_mesh_{name}_total");
        all.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no counter {name}")).1
    }
}

pub fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// Waits for something that must come true soon.
pub async fn until(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 30 s: {what}");
}
