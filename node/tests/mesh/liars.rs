//! A member with a valid certificate that lies about the others, over the real wire to whole nodes.
//! What must come of it for many nodes is in the simulator's scenarios `forged-*`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use node::NodeOptions;
use node::mesh::{Mesh, MeshOptions, PeerLine, Roster};
use protocol::NodeId;
use protocol::identity::Invite;
use protocol::membership::wire::{Body, Datagram, Update, VERSION};
use protocol::membership::{Addresses, MemberState};
use protocol::node_record::NodeRecord;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::support::{Heard, TestClock, TestNode, limits, loopback};

type Wire = Datagram<NodeId, Addresses>;

/// A node as the daemon runs it, without a model.
struct Whole {
    node: node::Node,
    mesh: Mesh,
    roster: Arc<Roster>,
    _data: TempDir,
}

impl Whole {
    async fn start(token: Option<&str>, clock: &TestClock) -> Whole {
        let data = tempfile::tempdir().unwrap();
        let roster = Roster::new();
        let options = MeshOptions {
            token: token.map(|t| t.parse::<Invite>().unwrap()),
            limits: limits(),
            clock: clock.clock(),
            service: roster.clone(),
            ..MeshOptions::new(data.path(), loopback())
        };
        let mesh = Mesh::start(options).await.unwrap();
        let options = NodeOptions { without_models: true, ..NodeOptions::new(loopback(), vec![]) };
        let node = node::serve(options).await.unwrap();
        node.join(mesh.clone(), roster.clone(), data.path()).unwrap();
        Whole { node, mesh, roster, _data: data }
    }

    fn token(&self) -> String {
        let grant = (protocol::identity::Roles::ALL, 1, 3600);
        self.mesh.identity().invite(grant, vec![self.mesh.address()]).unwrap().to_string()
    }

    /// What it holds of a member.
    async fn line(&self, node: NodeId) -> Option<PeerLine> {
        self.roster.peers().await.into_iter().find(|line| line.member.node == node)
    }

    async fn until(&self, what: &str, node: NodeId, is: impl Fn(&PeerLine) -> bool) -> PeerLine {
        for _ in 0..600 {
            if let Some(line) = self.line(node).await.filter(|line| is(line)) {
                return line;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("not within 30 s: {what}: {:?}", self.line(node).await);
    }

    async fn until_metric(&self, name: &str, least: u64) {
        for _ in 0..600 {
            if self.metric(name).await >= least {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("not within 30 s: {name} is {least}, but {}", self.metric(name).await);
    }

    /// A number of `/metrics`.
    async fn metric(&self, name: &str) -> u64 {
        let mut stream = tokio::net::TcpStream::connect(self.node.address()).await.unwrap();
        let request = "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))[name.len()..].trim().parse().unwrap()
    }
}

/// Two whole nodes and a member that lies to the first about the second. It answers pings, so that it
/// counts as a member that is alive.
struct Scene {
    a: Whole,
    victim: Whole,
    liar: TestNode,
}

impl Scene {
    async fn new() -> Scene {
        let clock = TestClock::new();
        let a = Whole::start(None, &clock).await;
        let victim = Whole::start(Some(&a.token()), &clock).await;
        let liar = TestNode::start(Some(&a.token()), &clock).await;
        liar.mesh.connect(a.mesh.address(), Some(a.mesh.node())).await.unwrap();
        tokio::spawn(answer(liar.mesh.clone(), liar.heard.clone()));
        let scene = Scene { a, victim, liar };
        let contact = Addresses::new([scene.liar.mesh.address()]).unwrap();
        let (id, incarnation, version) = (scene.liar.id(), 0, 0);
        scene.say(Update::Alive { id, incarnation, version, contact });
        let alive = |line: &PeerLine| line.member.state == MemberState::Alive;
        scene.a.until("the liar is a member", id, alive).await;
        scene.a.until("the victim is a member", scene.id(), alive).await;
        scene.victim.until("the victim knows a", scene.a.mesh.node(), alive).await;
        scene
    }

    /// The victim's.
    fn id(&self) -> NodeId {
        self.victim.mesh.node()
    }

    /// A piece of news from the liar to the first node.
    fn say(&self, update: Update<NodeId, Addresses>) {
        let bytes = gossip(vec![update]).encode();
        assert!(self.liar.mesh.send_datagram(self.a.mesh.node(), bytes.into()));
    }

    async fn incarnation(&self) -> u64 {
        self.a.line(self.id()).await.unwrap().member.incarnation
    }
}

fn gossip(updates: Vec<Update<NodeId, Addresses>>) -> Wire {
    Datagram { version: VERSION, flags: 0, incarnation: 0, body: Body::Gossip, updates }
}

async fn answer(mesh: Mesh, heard: Arc<Heard>) {
    loop {
        let datagrams = std::mem::take(&mut *heard.datagrams.lock().unwrap());
        for (from, bytes) in datagrams {
            if let Ok(Datagram { body: Body::Ping { probe }, .. }) = Wire::decode(&bytes) {
                let ack = Datagram { body: Body::Ack { probe }, ..gossip(vec![]) };
                mesh.send_datagram(from, ack.encode().into());
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_healthy_member_is_not_lied_to_death() {
    let scene = Scene::new().await;
    let (a, victim) = (&scene.a, scene.id());
    // Again and again, at the incarnation that the victim has by then.
    let mut incarnations = BTreeSet::new();
    for round in 0..14 {
        let incarnation = scene.incarnation().await;
        incarnations.insert(incarnation);
        scene.say(match round % 2 {
            0 => Update::Dead { id: victim, incarnation },
            _ => Update::Suspect { id: victim, incarnation, accusers: vec![scene.liar.id()] },
        });
        let damped = a.metric("grapevine_membership_accusations_damped_total").await;
        for _ in 0..30 {
            let line = a.line(victim).await.unwrap();
            assert!(line.member.state.is_present(), "round {round}: {line:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
            // Refuted with a higher incarnation, or not listened to.
            let now = a.metric("grapevine_membership_accusations_damped_total").await;
            if line.member.incarnation > incarnation || now > damped {
                break;
            }
        }
    }
    assert!(incarnations.len() > 2, "it refutes: {incarnations:?}");
    assert!(incarnations.len() < 9, "in the end nobody listens to the liar: {incarnations:?}");
    assert!(a.metric("grapevine_membership_accusations_damped_total").await >= 4);
    assert_eq!(a.metric("grapevine_membership_deaths_total").await, 0);
    assert!(scene.victim.metric("grapevine_membership_refutations_total").await >= 2);
    let alive = |line: &PeerLine| line.member.state == MemberState::Alive;
    a.until("the victim is alive", victim, alive).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_farewell_and_an_address_in_the_name_of_another() {
    let scene = Scene::new().await;
    let (a, victim) = (&scene.a, scene.id());
    let incarnation = scene.incarnation().await;
    scene.say(Update::Left { id: victim, incarnation });
    let refuted = |line: &PeerLine| line.member.incarnation > incarnation;
    let line = a.until("it denies that it has left", victim, refuted).await;
    assert!(line.member.state.is_present(), "{line:?}");

    // From now on, it says, the victim is where the liar is.
    let incarnation = line.member.incarnation + 5;
    let contact = Addresses::new([scene.liar.mesh.address()]).unwrap();
    scene.say(Update::Alive { id: victim, incarnation, version: 9, contact });
    let own = vec![scene.victim.mesh.address()];
    let corrected =
        |line: &PeerLine| line.member.incarnation > incarnation && line.member.addresses == own;
    a.until("it says itself where it is", victim, corrected).await;

    // Nor do incarnations that nobody has reached stick.
    const REFUSED: &str = "grapevine_membership_claims_refused_total{reason=\"jump\"}";
    let refused = a.metric(REFUSED).await;
    scene.say(Update::Dead { id: victim, incarnation: 1 << 61 });
    a.until_metric(REFUSED, refused + 1).await;
    let line = a.line(victim).await.unwrap();
    assert!(line.member.state.is_present() && line.member.incarnation < 1000, "{line:?}");
    assert_eq!(a.metric("grapevine_membership_deaths_total").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn noise_of_a_member_is_counted_and_changes_nothing() {
    let scene = Scene::new().await;
    let before = scene.a.metric("grapevine_membership_malformed_total").await;
    for n in 0..64u8 {
        let bytes = vec![[VERSION, 0, 0, n][usize::from(n) % 4]; usize::from(n) * 9 + 1];
        scene
            .liar
            .mesh
            .send_datagram(scene.a.mesh.node(), [&[VERSION], &bytes[..]].concat().into());
    }
    scene.a.until_metric("grapevine_membership_malformed_total", before + 32).await;
    let line = scene.a.line(scene.id()).await.unwrap();
    assert!(line.member.state.is_present());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_is_its_senders_whatever_it_says() {
    let scene = Scene::new().await;
    let (a, liar) = (&scene.a, scene.liar.id());
    let known = |line: &PeerLine| line.record.is_some();
    let of_victim = a.until("the victim's record", scene.id(), known).await.record;
    // A record names nobody: it is the one of who proved its key on the connection.
    let name = of_victim.clone().unwrap().name;
    let forged = NodeRecord { name, draining: true, ..NodeRecord::default() };
    let within = Duration::from_secs(5);
    let send = |body: Vec<u8>| scene.liar.mesh.call(a.mesh.node(), "record", body, within);
    send(forged.to_bytes().0).await.unwrap();
    let is_forged = |line: &PeerLine| line.record.as_ref() == Some(&forged);
    a.until("the liar's own record", liar, is_forged).await;
    assert_eq!(a.line(scene.id()).await.unwrap().record, of_victim);
    // What is no record, or breaks a bound, leaves the last one.
    let many = vec![protocol::node_record::ReplicaRecord::default(); 33];
    let many = protocol::wire::encode(&NodeRecord { replicas: many, ..NodeRecord::default() });
    for bad in [vec![], vec![255; 100], vec![0; 4096], many] {
        send(bad).await.unwrap();
        assert!(is_forged(&a.line(liar).await.unwrap()));
    }
    assert_eq!(a.line(scene.id()).await.unwrap().record, of_victim);
}
