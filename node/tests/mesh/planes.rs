//! The data plane and the overlay on one port.

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use node::mesh::overlay::{
    Address, Member, Overlay, OverlayConfig, OverlayEvent, OverlayHandle, Path,
};
use node::mesh::{Endpoint, MeshCounters};
use node::metrics::Metrics;
use protocol::MeshId;
use protocol::identity::NodeKey;
use tokio::sync::mpsc::Receiver;

use super::support::{TestClock, TestNode, limits, loopback, until};

struct OnOverlay {
    handle: OverlayHandle,
    events: Receiver<OverlayEvent>,
}

impl OnOverlay {
    fn start(endpoint: &Endpoint, mesh: MeshId, members: Vec<Member>) -> OnOverlay {
        let metrics = Metrics::new().unwrap();
        let config = OverlayConfig { members, ..OverlayConfig::new(mesh) };
        let (handle, events) = Overlay::start(config, endpoint, metrics.overlay()).unwrap();
        OnOverlay { handle, events }
    }

    fn of(node: &TestNode, members: Vec<Member>) -> OnOverlay {
        let mesh = node.mesh.standing().unwrap().trust.mesh();
        OnOverlay::start(node.mesh.endpoint(), mesh, members)
    }

    async fn until_event(&mut self, expect: OverlayEvent) {
        let waiting = async {
            while let Some(event) = self.events.recv().await {
                if event == expect {
                    return true;
                }
            }
            false
        };
        let seen = tokio::time::timeout(Duration::from_secs(30), waiting).await;
        assert_eq!(seen, Ok(true), "{expect:?}");
    }
}

fn member(node: &TestNode) -> Member {
    Member { node: node.id(), addresses: vec![Address::Direct(node.mesh.address())] }
}

async fn pair() -> (TestNode, TestNode) {
    let clock = TestClock::new();
    let a = TestNode::start(None, &clock).await;
    let b = TestNode::start(Some(&a.token(1)), &clock).await;
    b.connected(&a).await;
    (a, b)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_planes_use_one_port_at_the_same_time() {
    let (a, b) = pair().await;
    let mut over_a = OnOverlay::of(&a, vec![member(&b)]);
    let mut over_b = OnOverlay::of(&b, vec![member(&a)]);
    over_a.until_event(OverlayEvent::Hears { node: b.id() }).await;
    over_b.until_event(OverlayEvent::Hears { node: a.id() }).await;
    let to_b = over_a.handle.status().peers;
    assert_eq!(to_b.len(), 1);
    assert_eq!((to_b[0].path, to_b[0].at), (Path::Direct, Some(b.mesh.address())));
    for n in 0..8u8 {
        over_a.handle.publish(Bytes::from(vec![n])).unwrap();
        assert!(a.reaches(&b).await && b.reaches(&a).await);
        let bytes = Bytes::from(vec![n]);
        over_b.until_event(OverlayEvent::Message { from: a.id(), bytes }).await;
    }

    // The data plane does not need the overlay, and the overlay's end leaves nothing behind.
    over_b.handle.shutdown().await;
    over_a.until_event(OverlayEvent::Disconnected { node: b.id() }).await;
    assert!(a.reaches(&b).await && b.reaches(&a).await);
    let mut again = OnOverlay::of(&b, vec![member(&a)]);
    again.until_event(OverlayEvent::Hears { node: a.id() }).await;

    // The overlay ends with its endpoint.
    a.mesh.shutdown().await;
    let ended = async { while over_a.events.recv().await.is_some() {} };
    tokio::time::timeout(Duration::from_secs(10), ended).await.expect("it ends");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_garbage_leave_both_planes_as_they_were() {
    let (a, b) = pair().await;
    let mut over_a = OnOverlay::of(&a, vec![member(&b)]);
    let counters = Arc::<MeshCounters>::default();
    let key = NodeKey::from_secret([200; 32]);
    let endpoint = Endpoint::bind(&key, loopback(), Arc::new(limits()), counters).unwrap();
    tokio::spawn(endpoint.clone().serve_overlay());
    let mesh = a.mesh.standing().unwrap().trust.mesh();
    let mut stranger = OnOverlay::start(&endpoint, mesh, vec![member(&a), member(&b)]);
    // Shown the door by a's overlay, and by b, which runs none.
    stranger.until_event(OverlayEvent::Disconnected { node: a.id() }).await;
    until("refused", || b.count("connections_refused") >= 1).await;
    // The stranger may know sooner than a that it is gone.
    until("gone", || over_a.handle.status().peers.is_empty()).await;

    let noise = UdpSocket::bind(loopback()).unwrap();
    for length in (1..1400).step_by(7) {
        let bytes: Vec<u8> = (0..length).map(|i| (i * length % 251) as u8).collect();
        noise.send_to(&bytes, a.mesh.address()).unwrap();
    }
    assert!(a.reaches(&b).await && b.reaches(&a).await);
    let mut over_b = OnOverlay::of(&b, vec![member(&a)]);
    over_b.until_event(OverlayEvent::Hears { node: a.id() }).await;
    over_a.until_event(OverlayEvent::Hears { node: b.id() }).await;
}
