//! The overlay beside the data plane: it is told who the members are and where they may be, and the data
//! plane takes the ways that it opens. Where the overlay is connected directly, the data plane dials the
//! same address and gets through the same hole: both use one socket. Where the overlay is connected over a
//! relay only, the data plane connects over a carrier ([`super::carrier`]).
//!
//! Nothing here is needed where nodes reach each other anyway. What fails here is logged and leaves the
//! data plane as it was.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use protocol::NodeId;
use tokio::sync::{Semaphore, mpsc};

use super::Mesh;
use super::overlay::{
    Address, Member, Overlay, OverlayConfig, OverlayEvent, OverlayHandle, OverlayStatus, Path,
    PeerPath, StartError,
};
use crate::metrics::OverlayMetrics;

/// See the module.
pub(super) struct Reach {
    mesh: Mesh,
    overlay: OverlayHandle,
    /// What the overlay was told last.
    told: Mutex<Vec<Member>>,
    dials: Arc<Semaphore>,
}

impl Reach {
    /// Starts the overlay on the mesh's endpoint; it ends with that.
    ///
    /// # Errors
    /// If there is no overlay; the node goes on without.
    pub fn start(mesh: &Mesh, metrics: OverlayMetrics) -> Result<Arc<Reach>, StartError> {
        let Some(standing) = mesh.standing() else {
            return Err(StartError::Protocol("this node belongs to no mesh".to_owned()));
        };
        let config =
            OverlayConfig { mdns: mesh.mdns(), ..OverlayConfig::new(standing.trust.mesh()) };
        let (overlay, events) = Overlay::start(config, mesh.endpoint(), metrics)?;
        // Where the operator says that others reach this node; where it listens is found out.
        for &at in mesh.contact().addresses.iter().filter(|&&at| at != mesh.address()) {
            overlay.add_external(at);
        }
        let reach = Arc::new(Reach {
            mesh: mesh.clone(),
            overlay,
            told: Mutex::default(),
            dials: Arc::new(Semaphore::new(DIALS_MAX)),
        });
        tokio::spawn(reach.clone().follow(events));
        Ok(reach)
    }

    /// Says who the members are; known ones cost nothing.
    pub fn set_members(&self, members: Vec<Member>) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if *told != members {
            self.overlay.set_members(members.clone());
            *told = members;
        }
    }

    /// The data plane cannot reach a member: the overlay looks for a way now.
    pub fn want(&self, node: NodeId) {
        self.overlay.dial(node);
    }

    /// Where the overlay is directly connected to a member.
    pub fn direct(&self, node: NodeId) -> Option<SocketAddr> {
        self.status().peers.into_iter().find(|peer| peer.node == node)?.at
    }

    /// Where others can reach this node's port, as far as the overlay found out.
    pub fn external(&self) -> Vec<SocketAddr> {
        let direct = |address: &Address| (!address.is_relayed()).then(|| address.socket());
        self.status().external.iter().filter_map(direct).collect()
    }

    pub fn status(&self) -> OverlayStatus {
        self.overlay.status()
    }

    /// Takes the ways that the overlay finds, until it ends.
    async fn follow(self: Arc<Self>, mut events: mpsc::Receiver<OverlayEvent>) {
        let mut waits: BTreeMap<NodeId, (Instant, Duration)> = BTreeMap::new();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(OverlayEvent::Connected { node, at: Some(_), .. }) => {
                        waits.remove(&node);
                        self.take_ways(&mut waits);
                    }
                    Some(OverlayEvent::Discovered { node, addresses, .. }) => {
                        self.discovered(node, &addresses);
                    }
                    Some(event) => tracing::debug!(?event, "overlay"),
                    None => return,
                },
                _ = look.tick() => self.take_ways(&mut waits),
            }
        }
    }

    /// Dials whom the overlay reaches and the data plane does not, with a growing wait for each.
    fn take_ways(self: &Arc<Self>, waits: &mut BTreeMap<NodeId, (Instant, Duration)>) {
        let now = Instant::now();
        let way = |peer: &PeerPath| match (peer.path, peer.at) {
            (Path::Direct, Some(at)) if !self.mesh.is_direct(peer.node) => Some(Way::At(vec![at])),
            (Path::Relayed, _) if self.mesh.link(peer.node).is_none() => Some(Way::Carried),
            _ => None,
        };
        let open: BTreeMap<NodeId, Way> =
            self.status().peers.iter().filter_map(|peer| Some((peer.node, way(peer)?))).collect();
        waits.retain(|node, _| open.contains_key(node));
        for (node, way) in open {
            let (due, wait) = waits.get(&node).copied().unwrap_or((now, RETRY_MIN));
            if due <= now && self.dial(node, way) {
                waits.insert(node, (now + wait, (wait * 2).min(RETRY_MAX)));
            }
        }
    }

    /// A member may be somewhere, or one that was a member when this node ran last; anybody else is none
    /// of our business.
    fn discovered(self: &Arc<Self>, node: NodeId, addresses: &[Address]) {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_told = told.iter().any(|member| member.node == node);
        drop(told);
        let is_known =
            || self.mesh.identity().contacts(None).iter().any(|contact| contact.node == node);
        if !is_told && !is_known() {
            return;
        }
        let direct = addresses.iter().filter(|address| !address.is_relayed());
        self.dial(node, Way::At(direct.map(Address::socket).take(ADDRESSES_MAX).collect()));
    }

    /// Dials unless the member is connected; false if too many dials are under way.
    fn dial(self: &Arc<Self>, node: NodeId, way: Way) -> bool {
        let Ok(permit) = self.dials.clone().try_acquire_owned() else { return false };
        let mesh = self.mesh.clone();
        tokio::spawn(async move {
            let _permit = permit;
            // Both ends see a new way: the other one dials only if nothing came of this.
            if mesh.node() > node {
                tokio::time::sleep(PRECEDENCE).await;
            }
            let addresses = match way {
                Way::At(addresses) => addresses,
                Way::Carried => {
                    if let Err(why) = mesh.connect_carried(node).await {
                        tracing::debug!(node = %node.short(), why, "nobody carries to a member");
                    }
                    return;
                }
            };
            for at in addresses {
                match mesh.connect(at, Some(node)).await {
                    Ok(_) => return,
                    Err(why) => {
                        tracing::debug!(node = %node.short(), %at, why, "no way for the data plane");
                    }
                }
            }
        });
        true
    }
}

/// How the data plane may reach a member.
enum Way {
    At(Vec<SocketAddr>),
    /// Over another member.
    Carried,
}

/// Dials under way; more wait for the next look.
const DIALS_MAX: usize = 8;
/// Addresses that are tried of those that one event names.
const ADDRESSES_MAX: usize = 4;
/// How often it is looked for ways that are not taken.
const LOOK: Duration = Duration::from_secs(1);
/// Wait before a way that led nowhere is tried again, doubled each time.
const RETRY_MIN: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// How long the node with the lower id is ahead.
const PRECEDENCE: Duration = Duration::from_millis(500);
