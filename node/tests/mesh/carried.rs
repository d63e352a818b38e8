//! Nodes that reach each other only over a third.

use std::time::Duration;

use node::mesh::{ECHO, MeshLimits};
use protocol::carry::CarryConfig;

use super::support::{TestClock, TestNode, limits, until};

/// Nodes that dial nobody by themselves: r founds, a and b join and are connected with r only.
async fn apart(of_r: CarryConfig) -> [TestNode; 3] {
    let clock = TestClock::new();
    let silent = || MeshLimits { dials_max: 0, ..limits() };
    let r = TestNode::start_with(None, &clock, MeshLimits { carry: of_r, ..silent() }).await;
    let token = r.token(2);
    let a = TestNode::start_with(Some(&token), &clock, silent()).await;
    let b = TestNode::start_with(Some(&token), &clock, silent()).await;
    for node in [&a, &b] {
        node.mesh.connect(r.mesh.address(), Some(r.id())).await.unwrap();
        r.connected(node).await;
    }
    [r, a, b]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_are_connected_over_a_third_while_it_lives() {
    let [r, a, b] = apart(CarryConfig::default()).await;
    assert!(!a.reaches(&b).await, "nothing connects them yet");
    a.mesh.connect_carried(b.id()).await.unwrap();
    b.connected(&a).await;
    assert!(a.reaches(&b).await && b.reaches(&a).await);
    for node in [&a, &b] {
        assert!(node.mesh.is_direct(r.id()));
    }
    assert!(!a.mesh.is_direct(b.id()) && !b.mesh.is_direct(a.id()));
    // Far more than a window, and both ways at once.
    let body: Vec<u8> = (0..900_000u32).map(|i| i as u8).collect();
    let there = a.mesh.call(b.id(), ECHO, body.clone(), Duration::from_secs(60));
    let back = b.mesh.call(a.id(), ECHO, body.clone(), Duration::from_secs(60));
    let (there, back) = tokio::join!(there, back);
    assert!(there.unwrap() == body && back.unwrap() == body);
    assert!(r.count("datagrams_carried") > 1000);

    // A way without a carrier is preferred at once.
    a.mesh.connect(b.mesh.address(), Some(b.id())).await.unwrap();
    assert!(a.mesh.is_direct(b.id()));
    assert!(a.reaches(&b).await);

    let [r2, c, d] = apart(CarryConfig::default()).await;
    c.mesh.connect_carried(d.id()).await.unwrap();
    d.connected(&c).await;
    r2.mesh.shutdown().await;
    for (node, other) in [(&c, &d), (&d, &c)] {
        let gone = || node.mesh.link(other.id()).is_none();
        until("the carrier takes what it carried with it", gone).await;
    }
}

/// As when a knock finds nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_carrier_that_is_given_up_takes_what_it_carried_with_it() {
    let [r, a, b] = apart(CarryConfig::default()).await;
    a.mesh.connect_carried(b.id()).await.unwrap();
    let over = a.mesh.link(b.id()).unwrap().address();
    assert_eq!(a.mesh.carrier(over), Some(r.id()));
    assert_eq!(a.mesh.carrier(r.mesh.address()), None);
    assert!(a.mesh.links_at(r.id(), b.mesh.address()).is_empty());
    for link in a.mesh.links_at(r.id(), r.mesh.address()) {
        link.close(0, "nobody listens there");
    }
    until("a has given both up", || a.mesh.link(b.id()).is_none() && !a.mesh.is_direct(r.id()))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_carrier_says_no() {
    let [r, a, b] = apart(CarryConfig { pairs_max: 0, ..CarryConfig::default() }).await;
    let why = a.mesh.connect_carried(b.id()).await.unwrap_err();
    assert!(why.contains("as many pairs as it may"), "{why}");
    b.mesh.shutdown().await;
    until("b is gone", || r.mesh.link(b.id()).is_none()).await;
    let why = a.mesh.connect_carried(b.id()).await.unwrap_err();
    assert!(why.contains("not connected here"), "{why}");
    r.mesh.shutdown().await;
    until("r is gone", || a.mesh.link(r.id()).is_none()).await;
    let why = a.mesh.connect_carried(b.id()).await.unwrap_err();
    assert!(why.contains("nobody is connected"), "{why}");
    assert_eq!(r.count("datagrams_carried"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parcels_that_nobody_asked_for_are_dropped() {
    use protocol::carry::{Parcel, Piece, Way};
    let [r, a, b] = apart(CarryConfig::default()).await;
    // Towards b, which nobody asked r to carry to, and one that is broken.
    let parcel =
        Parcel { way: Way::To, node: b.id(), number: 0, piece: Piece::Whole, bytes: &[0; 100] };
    let sent = [parcel.encode(), parcel.encode()[..20].to_vec()];
    for datagram in sent {
        assert!(a.mesh.send_datagram(r.id(), datagram.into()));
    }
    let dropped = || r.count("datagrams_not_carried") == 2;
    until("r has dropped both", dropped).await;
    // What claims to come from b reaches QUIC, which makes nothing of it.
    let forged = Parcel { way: Way::From, node: b.id(), ..parcel };
    assert!(a.mesh.send_datagram(r.id(), forged.encode().into()));
    assert!(a.reaches(&r).await && b.reaches(&r).await);
    assert!(b.heard.datagrams.lock().unwrap().is_empty(), "nothing of it is membership's");
    assert!(r.heard.datagrams.lock().unwrap().is_empty());
}
