//! Founding, inviting, joining, renewing, revoking, leaving.

use std::time::{Duration, Instant};

use bytes::Bytes;
use node::mesh::{IdentityError, Mesh, MeshError, MeshLimits, MeshOptions, PeerEvent};

use super::support::{HOUR, TestClock, TestNode, limits, start_at, until};

async fn refused(token: &str, clock: &TestClock) -> String {
    let data = tempfile::tempdir().unwrap();
    match start_at(data.path(), Some(token), clock, limits()).await {
        Ok(_) => panic!("joined"),
        Err(error) => error.to_string(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_become_a_mesh() {
    let clock = TestClock::new();
    let a = TestNode::start(None, &clock).await;
    let token = a.token(1);
    let b = TestNode::start(Some(&token), &clock).await;
    b.connected(&a).await;
    a.connected(&b).await;
    let (at_a, at_b) = ([a.mesh.address()], [b.mesh.address()]);
    assert_eq!((b.mesh.peer_at(&at_a), b.mesh.peer_at(&at_b)), (Some(a.id()), None));
    assert_eq!(a.mesh.peer_at(&at_b), Some(b.id()), "who was dialled knows the address, too");
    assert!(a.reaches(&b).await && b.reaches(&a).await);
    assert_eq!((a.count("certificates_granted"), a.count("joins_refused")), (1, 0));
    let mesh = |n: &TestNode| n.mesh.standing().unwrap().trust.mesh();
    assert_eq!(mesh(&a), mesh(&b));
    // The second node is made an authority, since the mesh has fewer than three.
    until("b is an authority", || {
        [&a, &b].iter().all(|n| n.mesh.standing().unwrap().trust.authorities().len() == 2)
    })
    .await;

    assert!(b.mesh.send_datagram(a.id(), Bytes::from_static(b"ping")));
    until("a datagram", || !a.heard.datagrams.lock().unwrap().is_empty()).await;
    assert_eq!(a.heard.datagrams.lock().unwrap()[0], (b.id(), Bytes::from_static(b"ping")));

    // The token is used up; the same node could have used it again.
    let why = refused(&token, &clock).await;
    assert!(why.contains("the token has been used (it was for 1)"), "{why}");
    // b is in its mesh for good, whatever token it is given.
    let b = b.restart().await;
    b.connected(&a).await;
    assert!(b.reaches(&a).await);
    let other = TestNode::start(None, &clock).await;
    let (id, data) = (b.id(), b.data);
    b.mesh.shutdown().await;
    drop((b.mesh, b.heard));
    let token = other.token(1);
    let again = start_at(data.path(), Some(&token), &clock, limits()).await.err().unwrap();
    assert!(matches!(again, MeshError::Identity(IdentityError::OtherMesh(_))), "{again}");
    until("a sees b go", || {
        let events = a.heard.events.lock().unwrap();
        matches!(events.last(), Some(PeerEvent::Disconnected { node }) if *node == id)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn joins_and_renewals_survive_the_founder() {
    let clock = TestClock::new();
    let a = TestNode::start(None, &clock).await;
    let (for_b, for_c, late) = (a.token(1), a.token(1), a.token(1));
    let b = TestNode::start(Some(&for_b), &clock).await;
    let c = TestNode::start(Some(&for_c), &clock).await;
    c.connected(&a).await;
    b.connected(&a).await;
    until("three authorities", || {
        [&a, &b, &c].iter().all(|n| n.mesh.standing().unwrap().trust.authorities().len() == 3)
    })
    .await;
    b.mesh.connect(c.mesh.address(), Some(c.id())).await.unwrap();
    let founder = a.id();
    a.mesh.shutdown().await;
    drop(a);

    // Joins: with a token of another authority.
    let d = TestNode::start(Some(&b.token(1)), &clock).await;
    d.connected(&b).await;
    // The founder is an authority still, so that its tokens are its own...
    let with_seed = |token: &str, at: &TestNode| {
        let mut invite: protocol::identity::Invite = token.parse().unwrap();
        invite.seeds = vec![at.mesh.address()];
        invite.to_string()
    };
    let late = with_seed(&late, &b);
    let why = refused(&late, &clock).await;
    assert!(why.contains(&format!("{} must be asked", founder.short())), "{why}");
    // ... until it is taken out of the set.
    b.mesh.identity().change_authorities(&[], &[founder]).unwrap();
    b.mesh.tell_news();
    until("c knows", || !c.mesh.standing().unwrap().trust.is_authority(founder)).await;
    until("d knows", || !d.mesh.standing().unwrap().trust.is_authority(founder)).await;
    let e = TestNode::start(Some(&late), &clock).await;
    e.connected(&b).await;
    // What was used stays used, whoever counts it: the founder had told the others.
    let why = refused(&with_seed(&for_c, &b), &clock).await;
    assert!(why.contains("has been used"), "{why}");

    // Renewals: two days later every certificate has expired; authorities renew themselves, others ask.
    clock.advance(48 * HOUR);
    for node in [&b, &c, &d, &e] {
        node.mesh.renew().await;
        let certificate = node.mesh.standing().unwrap().certificate;
        assert!(!certificate.body.is_due(node.mesh.identity().now()), "renewed");
    }
    let d = d.restart().await;
    d.connected(&b).await;
    assert!(d.reaches(&b).await);
}

/// A token that many hosts use at once is counted one after the other; who is too early is told when to
/// come back, and does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_comes_back_when_it_is_told_to_wait() {
    let clock = TestClock::new();
    let patient = || MeshLimits { join_burst: 1, join_refill: Duration::from_secs(2), ..limits() };
    let a = TestNode::start_with(None, &clock, patient()).await;
    let token = a.token(2);
    // Addresses are counted, too, so that each joiner has one of its own.
    let join = async |at: &str| {
        let data = tempfile::tempdir().unwrap();
        let options = MeshOptions {
            token: Some(token.parse().unwrap()),
            limits: limits(),
            clock: clock.clock(),
            ..MeshOptions::new(data.path(), at.parse().unwrap())
        };
        (Mesh::start(options).await.unwrap(), data)
    };
    let _b = join("127.0.0.2:0").await;
    assert_eq!(a.count("joins_limited"), 0);
    let begun = Instant::now();
    let (c, _data) = join("127.0.0.3:0").await;
    assert!(begun.elapsed() > Duration::from_secs(1), "it waited");
    assert_eq!((a.count("joins_limited"), a.count("certificates_granted")), (1, 2));
    until("c is connected", || !c.peers().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_others_and_of_yesterday() {
    let clock = TestClock::new();
    let a = TestNode::start(None, &clock).await;
    let stranger = TestNode::start(None, &clock).await;
    let why = stranger.mesh.connect(a.mesh.address(), None).await.unwrap_err();
    assert!(why.contains("another"), "{why}");
    until("counted", || a.count("members_refused") == 1).await;
    assert!(a.mesh.peers().is_empty());

    // b's clock stands still while a's goes on: its certificate expires without its noticing.
    let (old, now) = (TestClock::new(), clock);
    let token = a.token(1);
    let b = TestNode::start(Some(&token), &old).await;
    b.connected(&a).await;
    now.advance(25 * HOUR);
    a.mesh.renew().await;
    let b = b.restart().await;
    let why = b.mesh.connect(a.mesh.address(), Some(a.id())).await.unwrap_err();
    assert!(why.contains("begins") || why.contains("expired"), "{why}");
    assert!(a.mesh.peers().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_node_is_out_at_once() {
    let clock = TestClock::new();
    let a = TestNode::start(None, &clock).await;
    let b = TestNode::start(Some(&a.token(1)), &clock).await;
    let c = TestNode::start(Some(&a.token(1)), &clock).await;
    for node in [&b, &c] {
        node.connected(&a).await;
    }
    b.mesh.connect(c.mesh.address(), Some(c.id())).await.unwrap();
    a.mesh.identity().revoke(b.id(), true).unwrap();
    a.mesh.tell_news();
    until("b is disconnected from both", || b.mesh.peers().is_empty()).await;
    assert!(c.reaches(&a).await);
    for other in [&a, &c] {
        let why = b.mesh.connect(other.mesh.address(), None).await.unwrap_err();
        assert!(why.contains("revoked"), "{why}");
    }
    // Not even with a token, until it is taken back.
    let token = a.token(2);
    b.mesh.leave().await.unwrap();
    let data = b.data;
    drop(b.mesh);
    let again = start_at(data.path(), Some(&token), &clock, limits()).await.err().unwrap();
    assert!(again.to_string().contains("revoked"), "{again}");
    a.mesh.identity().revoke(b_id(&again, &a), false).unwrap();
    let (b, _) = start_at(data.path(), Some(&token), &clock, limits()).await.unwrap();
    until("b is back", || !b.peers().is_empty()).await;
}

/// The only revoked node that `a` knows.
fn b_id(_: &MeshError, a: &TestNode) -> protocol::NodeId {
    let trust = a.mesh.standing().unwrap().trust;
    let revoked = trust.revocations().iter().find(|e| e.body.revoked).unwrap();
    revoked.body.node
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_state_is_named() {
    let clock = TestClock::new();
    let a = TestNode::start(None, &clock).await;
    a.mesh.shutdown().await;
    let TestNode { mesh, data, .. } = a;
    drop(mesh);
    let state = data.path().join("mesh.redb");
    let whole = std::fs::read(&state).unwrap();
    std::fs::write(&state, vec![7; 4096]).unwrap();
    let error = start_at(data.path(), None, &clock, limits()).await.err().unwrap().to_string();
    assert!(error.contains("mesh.redb") && error.contains("damaged"), "{error}");
    std::fs::write(&state, whole).unwrap();
    std::fs::write(data.path().join("node.key"), "nonsense").unwrap();
    let error = start_at(data.path(), None, &clock, limits()).await.err().unwrap().to_string();
    assert!(error.contains("node.key") && error.contains("damaged"), "{error}");
}
