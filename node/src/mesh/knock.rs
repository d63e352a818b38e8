//! Whether a node that says nothing is still there.
//!
//! The host of a process that has died answers packets to its port at once (ICMP, port unreachable), but
//! tells only sockets that are connected to that port, which QUIC's own is not. So a socket of its own
//! knocks. A firewall may answer so for a node that lives: it counts only if the node does not answer on
//! its connection either.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use protocol::NodeId;
use tokio::net::UdpSocket;

use super::Roster;
use super::carried::is_carried;
use super::connections::CloseCode;
use super::rpc::ECHO;

impl Roster {
    /// Looks after a node that should have said something: membership probes it now, and if its process
    /// is gone its connection is closed, which ends whatever waits for it.
    pub(crate) async fn look_after(&self, node: NodeId) {
        self.check(node);
        let Some(mesh) = self.mesh() else { return };
        let Some(mut link) = mesh.link(node) else { return };
        // Of a node behind a carrier, only its own silence tells; but with the carrier it is gone, too.
        if let Some(carrier) = mesh.carrier(link.address()) {
            let Some(to_carrier) = mesh.link(carrier) else { return };
            link = to_carrier;
        }
        if is_carried(link.address()) || !is_refused(link.address()).await {
            return;
        }
        // Two that dialled each other at once have two connections. One that begins from here on is another
        // process's.
        let links = mesh.links_at(link.peer(), link.address());
        let within = ANSWER_MIN + (link.rtt() * 3).min(ANSWER_OF_RTT_MAX);
        if mesh.call(link.peer(), ECHO, Vec::new(), within).await.is_err() {
            tracing::warn!(node = %link.peer().short(), "a node's process is gone");
            for link in links {
                link.close(CloseCode::Gone as u32, "nobody listens there");
            }
        }
    }

    /// As [`lost`](Self::lost), for waits in which the node has nothing to say: it is looked after now
    /// and then.
    pub(crate) async fn lost_or_gone(&self, node: NodeId) {
        let looking = async {
            let mut pause = QUIET_MIN;
            loop {
                tokio::time::sleep(pause).await;
                self.look_after(node).await;
                pause = (pause * 2).min(QUIET_MAX);
            }
        };
        tokio::select! {
            () = self.lost(node) => {}
            () = looking => {}
        }
    }
}

/// Whether the host of a UDP address says that nobody listens there. A host that says nothing is not
/// waited for.
async fn is_refused(address: SocketAddr) -> bool {
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let knock = async {
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(address).await?;
        // Too short for a packet of QUIC, whose endpoints drop it.
        socket.send(&[0]).await?;
        socket.recv(&mut [0]).await
    };
    let answer = tokio::time::timeout(KNOCK_WITHIN, knock).await;
    matches!(answer, Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused)
}

/// Silence after which a node is looked after, at least and at most; twice as long after each time that
/// was for nothing. Too small: a knock for each token of a slow model. Too large: clients wait.
pub(crate) const QUIET_MIN: Duration = Duration::from_millis(50);
pub(crate) const QUIET_MAX: Duration = Duration::from_secs(1);
/// Most paths answer within it. Where one does not, membership finds out.
const KNOCK_WITHIN: Duration = Duration::from_millis(250);
/// Time in which a node answers whose host has said that it is gone. Too small: busy nodes behind such a
/// firewall lose their connections. Too large: clients wait.
const ANSWER_MIN: Duration = Duration::from_millis(50);
const ANSWER_OF_RTT_MAX: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_closed_port_is_told_from_one_that_says_nothing() {
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = silent.local_addr().unwrap();
        assert!(!is_refused(address).await);
        drop(silent);
        assert!(is_refused(address).await);
        let mapped: SocketAddr = format!("[::ffff:127.0.0.1]:{}", address.port()).parse().unwrap();
        assert!(is_refused(mapped).await);
    }
}
