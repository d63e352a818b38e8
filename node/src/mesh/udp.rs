//! The UDP socket under QUIC.
//!
//! As quinn's own for tokio, but for what counts where each packet is one token. It is woken by what
//! arrives and not each time that a receiver takes what was sent, and it does not ask for more packets
//! where it has just seen that there are none: two system calls and a wake-up less for each packet.
//! A packet that can only be an acknowledgement or as little leaves after what arrived has been passed on:
//! sending it takes as long as passing a token on, and wakes a peer that may want the same core.
//!
//! Packets to and from addresses of [`super::carried`] do not pass through it but through there.

use std::cell::Cell;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::carried::{Carried, is_carried};

/// See the module.
#[derive(Debug)]
pub(super) struct Socket {
    io: AsyncFd<UdpSocket>,
    state: UdpSocketState,
    /// A packet found no room.
    is_full: AtomicBool,
    carried: Option<Arc<Carried>>,
}

impl Socket {
    /// Takes a bound socket; must be called in a runtime.
    pub fn new(socket: UdpSocket) -> io::Result<Socket> {
        let state = UdpSocketState::new((&socket).into())?;
        // As much as the system allows; with less it works, too.
        let _ = state.set_recv_buffer_size((&socket).into(), BUFFER_BYTES);
        let _ = state.set_send_buffer_size((&socket).into(), BUFFER_BYTES);
        let io = watch(socket, Interest::READABLE)?;
        Ok(Socket { io, state, is_full: AtomicBool::new(false), carried: None })
    }

    /// Also for packets that other members carry.
    pub fn with_carried(self, carried: Arc<Carried>) -> Socket {
        Socket { carried: Some(carried), ..self }
    }

    /// A packet that a carrier has brought.
    fn poll_carried(
        &self,
        context: &mut Context<'_>,
        buffer: &mut [u8],
        meta: &mut RecvMeta,
    ) -> Poll<()> {
        let Some(carried) = &self.carried else { return Poll::Pending };
        let (addr, packet) = ready!(carried.poll(context));
        // What is too long is no packet that was asked for: its tag will not fit.
        let len = packet.len().min(buffer.len());
        buffer[..len].copy_from_slice(&packet[..len]);
        *meta = RecvMeta { addr, len, stride: len, ecn: None, dst_ip: None };
        Poll::Ready(())
    }

    /// Returns when a packet may find room.
    async fn room(self: Arc<Self>) {
        // A descriptor of its own, only while there is no room: the kernel tells whoever watches for
        // room of every single packet that has left.
        let again = self.io.get_ref().try_clone();
        match again.and_then(|again| watch(again, Interest::WRITABLE)) {
            // An error shows when the next packet is sent.
            Ok(watch) => {
                let _ = watch.writable().await;
            }
            // No descriptor is left.
            Err(_) => tokio::time::sleep(FULL_WAIT).await,
        }
        self.is_full.store(false, Ordering::Release);
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Room { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let may_wait = NEXT.take() == Next::MayWait;
        if is_carried(transmit.destination) {
            let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
            if let Some(carried) = &self.carried {
                for packet in transmit.contents.chunks(size) {
                    carried.send(transmit.destination, packet);
                }
            }
            return Ok(());
        }
        let is_small =
            transmit.segment_size.is_none() && transmit.contents.len() <= SMALL_BYTES_MAX;
        if may_wait && is_small {
            NEXT.set(Next::Waits);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let sent = self.state.send(self.io.get_ref().into(), transmit);
        if sent.as_ref().is_err_and(would_block) {
            self.is_full.store(true, Ordering::Release);
        }
        sent
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        if let ([buffer, ..], [meta, ..]) = (&mut *buffers, &mut *metas)
            && self.poll_carried(context, buffer, meta).is_ready()
        {
            return Poll::Ready(Ok(1));
        }
        loop {
            let mut ready = ready!(self.io.poll_read_ready(context))?;
            match self.state.recv(self.io.get_ref().into(), buffers, metas) {
                Ok(packets) => {
                    // Nobody on a network has an address that stands for a way over a carrier.
                    for forged in metas[..packets].iter_mut().filter(|m| is_carried(m.addr)) {
                        forged.len = 0;
                    }
                    // There were no more. One that has come since then makes the socket ready again:
                    // what is cleared is only what was known before the call.
                    if packets < buffers.len() {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(packets));
                }
                Err(error) if would_block(&error) => ready.clear_ready(),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.get_ref().local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

/// Waits for room on behalf of one connection.
struct Room {
    socket: Arc<Socket>,
    waiting: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
}

impl UdpPoller for Room {
    fn poll_writable(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Room { socket, waiting } = &mut *self;
        if NEXT.take() == Next::Waits {
            *waiting = Some(Box::pin(tokio::task::yield_now()));
        } else if waiting.is_none() {
            if !socket.is_full.load(Ordering::Acquire) {
                NEXT.set(Next::MayWait);
                return Poll::Ready(Ok(()));
            }
            *waiting = Some(Box::pin(socket.clone().room()));
        }
        if let Some(wait) = waiting {
            ready!(wait.as_mut().poll(context));
        }
        *waiting = None;
        Poll::Ready(Ok(()))
    }
}

/// What becomes of the packet that a connection sends next on this thread. Quinn asks for room and sends
/// in one go, and asks again at once where that failed; the call that sends does not name its connection.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Next {
    #[default]
    Leaves,
    /// If it is small.
    MayWait,
    /// For all that the runtime has to do now.
    Waits,
}

thread_local! {
    static NEXT: Cell<Next> = const { Cell::new(Next::Leaves) };
}

impl std::fmt::Debug for Room {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Room").field("socket", &self.socket).finish_non_exhaustive()
    }
}

#[expect(
    deprecated,
    reason = "unsound for types that give another descriptor each time, which std's socket does not; the \
              new form is unsafe"
)]
fn watch(socket: UdpSocket, interest: Interest) -> io::Result<AsyncFd<UdpSocket>> {
    AsyncFd::with_interest(socket, interest)
}

fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

/// Packets that the kernel keeps until this process runs; what comes beyond is lost. Linux gives at most
/// `net.core.rmem_max`, and each packet of 1,400 bytes takes 2 KiB of it. Too small: a burst of KV blocks
/// loses packets, and each loss slows the connection down. Too large: old packets wait in it.
const BUFFER_BYTES: usize = 4 << 20;
/// Size of a packet that waits until all else is done. Acknowledgements take 30 to 50 bytes, a ping of
/// membership as much, which loses nothing by it.
const SMALL_BYTES_MAX: usize = 64;
/// Wait for room where that cannot be watched for: a full buffer leaves within it at 1 Gbit/s.
const FULL_WAIT: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn transmit(destination: SocketAddr, contents: &[u8]) -> Transmit<'_> {
        Transmit { destination, ecn: None, contents, segment_size: None, src_ip: None }
    }

    fn bind() -> Arc<Socket> {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port is free");
        Arc::new(Socket::new(socket).expect("it is a UDP socket"))
    }

    async fn receive(socket: &Socket, at_once: usize) -> Vec<usize> {
        let mut buffers = vec![[0u8; 2048]; at_once];
        let mut metas = vec![RecvMeta::default(); at_once];
        let mut slices: Vec<_> = buffers.iter_mut().map(|b| IoSliceMut::new(b)).collect();
        let packets = poll_fn(|cx| socket.poll_recv(cx, &mut slices, &mut metas)).await;
        metas[..packets.expect("received")].iter().map(|meta| meta.len).collect()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_packet_arrives_however_they_come() {
        let (from, to) = (bind(), bind());
        let at = to.local_addr().unwrap();
        // more at once than one call takes, then one by one: each wait is ended by a packet alone
        for burst in [7, 1, 1, 3, 1] {
            for len in 1..=burst {
                from.try_send(&transmit(at, &vec![0; len])).unwrap();
            }
            let mut lengths = Vec::new();
            while lengths.len() < burst {
                lengths.extend(receive(&to, 3).await);
            }
            assert_eq!(lengths, (1..=burst).collect::<Vec<_>>());
        }
        let later = tokio::spawn(async move { receive(&to, 3).await });
        tokio::task::yield_now().await;
        from.try_send(&transmit(at, &[0; 9])).unwrap();
        assert_eq!(later.await.unwrap(), [9]);
    }

    #[tokio::test]
    async fn small_packets_leave_after_all_that_can_be_done_now() {
        let (from, to) = (bind(), bind());
        let at = to.local_addr().unwrap();
        let mut poller = from.clone().create_io_poller();
        let done = Arc::new(AtomicUsize::new(0));
        for (len, waits) in [(SMALL_BYTES_MAX, true), (SMALL_BYTES_MAX + 1, false)] {
            done.store(0, Ordering::Relaxed);
            for task in 0..3 {
                let done = done.clone();
                tokio::spawn(async move {
                    // and what these begin
                    tokio::spawn(async move { done.fetch_add(1, Ordering::Relaxed) });
                    task
                });
            }
            let before = loop {
                poll_fn(|cx| poller.as_mut().poll_writable(cx)).await.unwrap();
                match from.try_send(&transmit(at, &vec![0; len])) {
                    Ok(()) => break done.load(Ordering::Relaxed),
                    Err(error) => assert!(would_block(&error)),
                }
            };
            assert_eq!(before, if waits { 3 } else { 0 }, "{len} bytes");
            assert_eq!(receive(&to, 3).await, [len]);
        }
        // where nobody asked for room, nothing waits
        from.try_send(&transmit(at, &[0; 5])).expect("it leaves");
        assert_eq!(receive(&to, 3).await, [5]);
    }

    #[tokio::test]
    async fn who_finds_no_room_is_woken_when_there_is_some() {
        let (from, to) = (bind(), bind());
        let mut poller = from.clone().create_io_poller();
        poll_fn(|cx| poller.as_mut().poll_writable(cx)).await.expect("there is room at first");
        // loopback takes packets off the sender's account at once: its buffer is never full
        from.is_full.store(true, Ordering::Release);
        let full = poll_fn(|cx| Poll::Ready(poller.as_mut().poll_writable(cx))).await;
        assert!(full.is_pending(), "the kernel has not been heard yet");
        poll_fn(|cx| poller.as_mut().poll_writable(cx)).await.expect("there is room again");
        assert!(!from.is_full.load(Ordering::Acquire));
        from.try_send(&transmit(to.local_addr().unwrap(), &[0; 5])).expect("it is taken");
        assert_eq!(receive(&to, 3).await, [5]);
    }
}
