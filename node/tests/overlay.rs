//! The overlay plane with real sockets, on loopback.

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use node::mesh::overlay::{
    Address, CutOff, Discovery, KEY_LOG, Limits, Member, Overlay, OverlayConfig, OverlayEvent,
    OverlayHandle, OverlayStatus, Path, PeerPath, PublishError, Reachability, StartError,
    clear_key_log,
};
use node::mesh::{Endpoint, LinkError, MeshCounters, MeshLimits};
use node::metrics::Metrics;
use protocol::identity::NodeKey;
use protocol::{MeshId, NodeId};
use tokio::sync::mpsc;
use tokio::time::timeout;

const MESH: MeshId = MeshId([1; 32]);
const OTHER_MESH: MeshId = MeshId([2; 32]);

/// No step of these tests takes a second on an idle machine, but for those that await a retry.
const DEADLINE: Duration = Duration::from_secs(60);

struct Node {
    endpoint: Endpoint,
    handle: OverlayHandle,
    events: mpsc::Receiver<OverlayEvent>,
    metrics: Metrics,
    at: SocketAddr,
    seen: Vec<OverlayEvent>,
}

fn config(mesh: MeshId) -> OverlayConfig {
    OverlayConfig::new(mesh)
}

/// The endpoint of a node whose secret key is this byte, 32 times.
fn bind(seed: u8, at: SocketAddr) -> Result<Endpoint, LinkError> {
    let limits = MeshLimits { handshake_timeout: Duration::from_secs(2), ..MeshLimits::default() };
    let counters = Arc::<MeshCounters>::default();
    Endpoint::bind(&NodeKey::from_secret([seed; 32]), at, Arc::new(limits), counters)
}

/// As [`bind`], at a free port of loopback.
fn endpoint(seed: u8) -> Endpoint {
    bind(seed, "127.0.0.1:0".parse().unwrap()).unwrap()
}

/// Whether a node is connected directly.
fn is_direct(status: &OverlayStatus, node: NodeId) -> bool {
    status.peers.iter().any(|peer| peer.node == node && peer.path == Path::Direct)
}

impl Node {
    async fn start(seed: u8, config: OverlayConfig) -> Node {
        let metrics = Metrics::new().unwrap();
        let endpoint = endpoint(seed);
        tokio::spawn(endpoint.clone().serve_overlay());
        let (handle, events) = Overlay::start(config, &endpoint, metrics.overlay()).unwrap();
        let at = "0.0.0.0:0".parse().unwrap();
        let mut node = Node { endpoint, handle, events, metrics, at, seen: Vec::new() };
        node.at = node
            .until("listens", |event| match event {
                OverlayEvent::Listening { address } => Some(*address),
                _ => None,
            })
            .await;
        node
    }

    fn id(&self) -> NodeId {
        self.handle.node()
    }

    /// This node as others are told of it, with its address.
    fn member(&self) -> Member {
        Member { node: self.id(), addresses: vec![Address::Direct(self.at)] }
    }

    /// This node as others are told of it, without.
    fn name(&self) -> Member {
        Member { node: self.id(), addresses: Vec::new() }
    }

    /// The first event, from now on, that `what` takes.
    async fn until<T>(
        &mut self,
        name: &str,
        mut what: impl FnMut(&OverlayEvent) -> Option<T>,
    ) -> T {
        let waiting = async {
            loop {
                let event = self.events.recv().await.expect("the overlay runs");
                let found = what(&event);
                self.seen.push(event);
                if let Some(found) = found {
                    return found;
                }
            }
        };
        match timeout(DEADLINE, waiting).await {
            Ok(found) => found,
            Err(_) => panic!("{name} did not happen; what did: {:#?}", self.seen),
        }
    }

    async fn until_event(&mut self, expect: OverlayEvent) {
        self.until(&format!("{expect:?}"), |event| (*event == expect).then_some(())).await;
    }

    async fn until_message(&mut self, from: NodeId, bytes: &'static [u8]) {
        self.until_event(OverlayEvent::Message { from, bytes: Bytes::from_static(bytes) }).await;
    }

    async fn until_status(&self, name: &str, what: impl FnMut(&OverlayStatus) -> bool) {
        let mut status = self.handle.watch();
        let found = timeout(DEADLINE, status.wait_for(what)).await.map(|_| ());
        assert!(found.is_ok(), "{name} did not happen: {:?}", self.handle.status());
    }

    /// A line of the metrics, awaited.
    async fn until_metric(&self, line: &str) {
        let waiting = async {
            while !self.metrics.render().contains(line) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let done = timeout(DEADLINE, waiting).await;
        assert!(done.is_ok(), "no {line} in {}", self.metrics.render());
    }
}

/// Two nodes that know each other and hear each other.
async fn pair(first: OverlayConfig, second: OverlayConfig) -> (Node, Node) {
    let mut a = Node::start(1, first).await;
    let mut b = Node::start(2, second).await;
    b.handle.set_members(vec![a.name()]);
    a.handle.set_members(vec![b.member()]);
    a.until_event(OverlayEvent::Hears { node: b.id() }).await;
    b.until_event(OverlayEvent::Hears { node: a.id() }).await;
    (a, b)
}

#[tokio::test]
async fn nodes_find_each_other_through_one_seed() {
    let mut seed = Node::start(1, config(MESH)).await;
    let mut a = Node::start(2, config(MESH)).await;
    let mut b = Node::start(3, config(MESH)).await;
    seed.handle.set_members(vec![a.name(), b.name()]);
    a.handle.set_members(vec![seed.member(), b.name()]);
    b.handle.set_members(vec![seed.member(), a.name()]);
    a.until("somebody tells of the other", |event| match event {
        OverlayEvent::Discovered { node, addresses, how } if *node == b.id() => {
            assert!(addresses.contains(&Address::Direct(b.at)), "{addresses:?}");
            assert_ne!(*how, Discovery::Mdns);
            Some(())
        }
        _ => None,
    })
    .await;
    for (node, other) in [(&mut a, b.id()), (&mut b, seed.id())] {
        let connected = |event: &OverlayEvent| match event {
            OverlayEvent::Hears { node } if *node == other => Some(()),
            _ => None,
        };
        if node.seen.iter().find_map(connected).is_none() {
            node.until("hears", connected).await;
        }
    }
    a.handle.publish(Bytes::from_static(b"hello")).unwrap();
    b.until_message(a.id(), b"hello").await;
    seed.until_message(a.id(), b"hello").await;
    let status = a.handle.status();
    assert_eq!(status.members, 2);
    assert!(is_direct(&status, b.id()), "{status:?}");
}

#[tokio::test]
async fn a_broadcast_is_passed_on() {
    // Room for one connection each: the two ends cannot talk directly.
    let alone =
        || OverlayConfig { limits: Limits { connections: 1, ..Limits::default() }, ..config(MESH) };
    let mut middle = Node::start(1, config(MESH)).await;
    let mut a = Node::start(2, alone()).await;
    let mut b = Node::start(3, alone()).await;
    middle.handle.set_members(vec![a.name(), b.name()]);
    for (node, other) in [(&a, &b), (&b, &a)] {
        node.handle.set_members(vec![middle.member(), other.name()]);
    }
    for node in [a.id(), b.id()] {
        let heard = |event: &OverlayEvent| (*event == OverlayEvent::Hears { node }).then_some(());
        if middle.seen.iter().find_map(heard).is_none() {
            middle.until("hears", heard).await;
        }
    }
    a.until_event(OverlayEvent::Hears { node: middle.id() }).await;
    a.handle.publish(Bytes::from_static(b"far")).unwrap();
    b.until_message(a.id(), b"far").await;
}

#[tokio::test]
async fn a_stranger_is_refused() {
    let (a, mut b) = pair(config(MESH), config(MESH)).await;
    let mut stranger = Node::start(9, config(MESH)).await;
    stranger.handle.set_members(vec![a.member()]);
    // Its own side of the handshake ends first; then it is shown the door.
    stranger.until_event(OverlayEvent::Disconnected { node: a.id() }).await;
    a.until_metric(r#"grapevine_overlay_refused_total{reason="stranger"} 1"#).await;
    let strangers = |event: &OverlayEvent| matches!(event, OverlayEvent::Connected { node, .. } if *node == stranger.id());
    assert!(!a.seen.iter().any(strangers));
    let only_b = PeerPath { node: b.id(), path: Path::Direct, at: Some(b.at) };
    assert_eq!(a.handle.status().peers, [only_b]);
    a.handle.publish(Bytes::from_static(b"on we go")).unwrap();
    b.until_message(a.id(), b"on we go").await;
}

#[tokio::test]
async fn who_is_no_member_any_more_is_disconnected() {
    let (mut a, mut b) = pair(config(MESH), config(MESH)).await;
    a.handle.set_members(Vec::new());
    a.until_event(OverlayEvent::Disconnected { node: b.id() }).await;
    b.until_event(OverlayEvent::Disconnected { node: a.id() }).await;
    assert!(a.handle.status().peers.is_empty());
}

#[tokio::test]
async fn another_mesh_is_refused() {
    let mut a = Node::start(1, config(MESH)).await;
    let mut b = Node::start(2, config(OTHER_MESH)).await;
    b.handle.set_members(vec![a.name()]);
    a.handle.set_members(vec![b.member()]);
    let (id_a, id_b) = (a.id(), b.id());
    let cut_off = |node| OverlayEvent::CutOff { node, why: CutOff::OtherMesh };
    // Whoever reads the other's description first.
    let quick = tokio::select! {
        () = a.until_event(cut_off(id_b)) => &a,
        () = b.until_event(cut_off(id_a)) => &b,
    };
    quick.until_metric(r#"grapevine_overlay_cut_off_total{reason="other_mesh"} 1"#).await;
    quick.until_metric(r#"grapevine_overlay_peers{path="direct"} 0"#).await;
    let heard = |event: &OverlayEvent| matches!(event, OverlayEvent::Hears { .. });
    assert!(!a.seen.iter().chain(&b.seen).any(heard));
}

#[tokio::test]
async fn oversized_broadcasts_are_refused() {
    let small = Limits::default().message_bytes;
    let wide = Limits { message_bytes: 8 * small, frame_bytes: 16 * small, ..Limits::default() };
    let hostile = OverlayConfig { limits: wide, ..config(MESH) };
    let (mut a, b) = pair(config(MESH), hostile).await;

    let bytes = Bytes::from(vec![0; small + 1]);
    let refused = PublishError::TooLarge { bytes: small + 1, max: small };
    assert_eq!(a.handle.publish(bytes.clone()), Err(refused));

    b.handle.publish(bytes).unwrap();
    a.until_event(OverlayEvent::CutOff { node: b.id(), why: CutOff::Oversized }).await;
    a.until_event(OverlayEvent::Disconnected { node: b.id() }).await;
    assert!(!a.seen.iter().any(|event| matches!(event, OverlayEvent::Message { .. })));
    a.until_metric(r#"grapevine_overlay_cut_off_total{reason="oversized"} 1"#).await;
}

#[tokio::test]
async fn frames_beyond_the_limit_end_their_stream_and_nothing_else() {
    let wide = Limits { message_bytes: 1 << 20, frame_bytes: 2 << 20, ..Limits::default() };
    let hostile = OverlayConfig { limits: wide, ..config(MESH) };
    let (a, mut b) = pair(config(MESH), hostile).await;
    b.handle.publish(Bytes::from(vec![0; 1 << 20])).unwrap();
    a.handle.publish(Bytes::from_static(b"still here")).unwrap();
    b.until_message(a.id(), b"still here").await;
    assert!(!a.seen.iter().any(|event| matches!(event, OverlayEvent::Message { .. })));
}

#[tokio::test]
async fn endless_broadcasts_are_cut_off() {
    let fast = Limits { messages_per_second: 100_000, ..Limits::default() };
    let hostile = OverlayConfig { limits: fast, ..config(MESH) };
    let (mut a, b) = pair(config(MESH), hostile).await;
    let flood = async {
        loop {
            if b.handle.publish(Bytes::from_static(b"again")) == Err(PublishError::Busy) {
                tokio::task::yield_now().await;
            }
        }
    };
    tokio::select! {
        () = a.until_event(OverlayEvent::CutOff { node: b.id(), why: CutOff::Rate }) => {}
        () = flood => unreachable!("it never ends"),
    }
    let messages = |event: &&OverlayEvent| matches!(event, OverlayEvent::Message { .. });
    let taken = a.seen.iter().filter(messages).count();
    // What the burst allows, and what came in while it was spent.
    assert!((256..512).contains(&taken), "{taken}");
}

#[tokio::test]
async fn shutdown_is_clean() {
    let (mut a, mut b) = pair(config(MESH), config(MESH)).await;
    let (id, at) = (a.id(), a.at);
    timeout(DEADLINE, a.handle.shutdown()).await.unwrap();
    while timeout(DEADLINE, a.events.recv()).await.unwrap().is_some() {}
    b.until_event(OverlayEvent::Disconnected { node: id }).await;
    a.endpoint.close("stopped").await;
    drop(a.endpoint);
    let waiting = async {
        // The tasks let go of the socket a moment after the endpoint has closed.
        while UdpSocket::bind(at).is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(DEADLINE, waiting).await.is_ok(), "the port is still taken");
}

#[tokio::test]
async fn a_taken_port_is_an_error() {
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    match bind(1, address).map(|_| ()) {
        Err(LinkError::Listen { address: at, .. }) => assert_eq!(at, address),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_relay_connects_and_the_hole_is_punched() {
    let public = OverlayConfig { reachability: Reachability::Public, ..config(MESH) };
    let private = OverlayConfig { reachability: Reachability::Private, ..config(MESH) };
    let relay = Node::start(1, public).await;
    let mut a = Node::start(2, private.clone()).await;
    let mut b = Node::start(3, private).await;
    relay.handle.set_members(vec![a.name(), b.name()]);
    let circuit = Address::Relayed { relay: relay.id(), at: relay.at };
    for node in [&mut a, &mut b] {
        node.handle.set_members(vec![relay.member()]);
        node.until_event(OverlayEvent::RelayHeld { relay: relay.id(), address: circuit }).await;
        node.until_status("a relay address", |status| status.external == [circuit]).await;
    }
    // They are on one host: only now may they know each other, and only by way of the relay.
    a.handle.set_members(vec![relay.member(), b.name()]);
    let by_relay = Member { node: a.id(), addresses: vec![circuit] };
    b.handle.set_members(vec![relay.member(), by_relay]);
    let relayed = |node| OverlayEvent::Connected { node, path: Path::Relayed, at: None };
    b.until_event(relayed(a.id())).await;
    a.until_event(relayed(b.id())).await;
    relay.until_metric("grapevine_overlay_circuits 1").await;
    let punched = OverlayEvent::HolePunched { node: a.id(), result: Ok(()) };
    let direct = OverlayEvent::Connected { node: a.id(), path: Path::Direct, at: Some(a.at) };
    let mut both = (false, false);
    b.until("a direct path", |event| {
        both.0 |= *event == punched;
        both.1 |= *event == direct;
        (both == (true, true)).then_some(())
    })
    .await;
    // The relayed connection has no use any more.
    relay.until_metric("grapevine_overlay_circuits 0").await;
    b.until_metric(r#"grapevine_overlay_hole_punches_total{outcome="punched"} 1"#).await;
    let status = b.handle.status();
    assert!(is_direct(&status, a.id()), "{status:?}");
}

/// Runs this test once more in a process whose environment has the variable: it cannot be set in this
/// one, which has other threads.
#[test]
fn secrets_are_not_written_to_a_file() {
    const CHILD: &str = "GRAPEVINE_TEST_KEY_LOG";
    let name = "secrets_are_not_written_to_a_file";
    match std::env::var(CHILD).as_deref() {
        Ok("refuse") => {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let _inside = runtime.enter();
            let metrics = Metrics::new().unwrap();
            let started = Overlay::start(config(MESH), &endpoint(1), metrics.overlay());
            assert!(matches!(started.map(|_| ()), Err(StartError::KeyLog)));
        }
        Ok("clear") => {
            clear_key_log().unwrap();
            assert_eq!(std::env::var_os(KEY_LOG), None);
        }
        _ => {
            for what in ["refuse", "clear"] {
                let mut child = Command::new(std::env::current_exe().unwrap());
                child
                    .args([name, "--exact", "--nocapture"])
                    .env(CHILD, what)
                    .env(KEY_LOG, "/dev/null");
                let output = child.output().unwrap();
                let text = String::from_utf8_lossy(&output.stdout);
                assert!(output.status.success() && text.contains("1 passed"), "{what}: {text}");
            }
        }
    }
}
