//! Tokio under QUIC, where each packet is one token.
//!
//! As quinn's own, but for two habits that cost more than the packet does. After a packet that took it
//! longer than usual, the endpoint's task wakes itself to look for another one; tokio takes that for work to
//! share and wakes a second thread, which finds nothing. Here such a task is polled once more on the
//! spot. And a connection moves its timer with each packet, almost always to later; here the timer stays
//! where it is, and when it is over it looks at what is wanted by then.

use std::io;
use std::net::UdpSocket;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::time::Instant;

use futures_util::task::AtomicWaker;
use quinn::{AsyncTimer, AsyncUdpSocket};
use tokio::time::Sleep;

use super::udp::Socket;

/// See the module.
#[derive(Debug)]
pub(super) struct Runtime;

impl quinn::Runtime for Runtime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        Box::pin(Timer { at, sleep: Box::pin(tokio::time::sleep_until(at.into())) })
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        tokio::spawn(Twice::new(future));
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        Ok(Arc::new(Socket::new(socket)?))
    }
}

/// Is over at `at`. The sleep under it ends at that time or before.
#[derive(Debug)]
struct Timer {
    at: Instant,
    sleep: Pin<Box<Sleep>>,
}

impl AsyncTimer for Timer {
    fn reset(mut self: Pin<&mut Self>, at: Instant) {
        self.at = at;
        if at < self.sleep.deadline().into_std() {
            self.sleep.as_mut().reset(at.into());
        }
    }

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(Future::poll(self.sleep.as_mut(), context));
            if self.at <= self.sleep.deadline().into_std() {
                return Poll::Ready(());
            }
            let at = self.at.into();
            self.sleep.as_mut().reset(at);
        }
    }
}

/// A future that is polled once more when it was woken while it was polled.
struct Twice {
    future: Pin<Box<dyn Future<Output = ()> + Send>>,
    bell: Arc<Bell>,
    /// Rings the bell.
    waker: Waker,
}

impl Twice {
    fn new(future: Pin<Box<dyn Future<Output = ()> + Send>>) -> Twice {
        let bell = Arc::new(Bell { state: AtomicU8::new(IDLE), task: AtomicWaker::new() });
        let waker = bell.clone().into();
        Twice { future, bell, waker }
    }
}

impl Future for Twice {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let Twice { future, bell, waker } = &mut *self;
        bell.task.register(context.waker());
        for _ in 0..POLLS_MAX {
            bell.state.store(POLLED, Ordering::Release);
            if future.as_mut().poll(&mut Context::from_waker(waker)).is_ready() {
                return Poll::Ready(());
            }
            let idle =
                bell.state.compare_exchange(POLLED, IDLE, Ordering::AcqRel, Ordering::Acquire);
            if idle.is_ok() {
                return Poll::Pending;
            }
        }
        // There is work for longer: others have their turn first, and other threads may take it.
        bell.state.store(IDLE, Ordering::Release);
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Wakes a task, unless that is being polled: then it notes it.
struct Bell {
    state: AtomicU8,
    task: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let noted = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
            (state != IDLE).then_some(RUNG)
        });
        if noted.is_err() {
            self.task.wake();
        }
    }
}

/// Nobody polls the future.
const IDLE: u8 = 0;
/// It is polled.
const POLLED: u8 = 1;
/// It is polled, and was woken meanwhile.
const RUNG: u8 = 2;

/// Polls without a pause. Too small: tokens wake threads for nothing. Too large: bulk is received on one
/// thread while the others idle.
const POLLS_MAX: usize = 2;

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use super::*;

    /// Counts how often its task was woken.
    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn who_wakes_itself_is_polled_once_more_and_then_waits_its_turn() {
        // How many polls wake their own task, then: polls of one turn, whether the task was woken.
        for (busy, polls, woken) in [(0, 1, 0), (1, 2, 0), (2, 2, 1), (9, 2, 1)] {
            let count = Arc::new(AtomicUsize::new(0));
            let counted = count.clone();
            let mut twice = Twice::new(Box::pin(poll_fn(move |context| {
                if counted.fetch_add(1, Ordering::Relaxed) < busy {
                    context.waker().wake_by_ref();
                }
                Poll::Pending
            })));
            let task = Arc::new(Woken::default());
            let waker = task.clone().into();
            let turn = Pin::new(&mut twice).poll(&mut Context::from_waker(&waker));
            assert!(turn.is_pending());
            assert_eq!(count.load(Ordering::Relaxed), polls, "{busy} busy polls");
            assert_eq!(task.0.load(Ordering::Relaxed), woken, "{busy} busy polls");
            // Whoever wakes it between two turns wakes the task.
            twice.waker.wake_by_ref();
            assert_eq!(task.0.load(Ordering::Relaxed), woken + 1, "{busy} busy polls");
        }
    }

    #[test]
    fn a_future_that_ends_in_its_second_poll_has_ended() {
        let mut is_second = false;
        let mut twice = Twice::new(Box::pin(poll_fn(move |context| {
            context.waker().wake_by_ref();
            match std::mem::replace(&mut is_second, true) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })));
        let waker = Arc::new(Woken::default()).into();
        assert!(Pin::new(&mut twice).poll(&mut Context::from_waker(&waker)).is_ready());
    }

    #[tokio::test]
    async fn a_timer_ends_at_the_last_time_that_it_was_told() {
        let far = 3_600_000;
        for told in [
            &[far, 5][..],
            // Later, and later again: the first sleep ends in between.
            &[1, 5, 20],
            &[far, 1, 20],
        ] {
            let start = Instant::now();
            let at = |ms: u64| start + Duration::from_millis(ms);
            let mut timer = quinn::Runtime::new_timer(&Runtime, at(told[0]));
            for &ms in told {
                timer.as_mut().reset(at(ms));
                let early = poll_fn(|context| Poll::Ready(timer.as_mut().poll(context))).await;
                assert!(early.is_pending() || Instant::now() >= at(ms), "{told:?}");
            }
            let over = poll_fn(|context| timer.as_mut().poll(context));
            tokio::time::timeout(Duration::from_secs(60), over).await.expect("it ends");
            assert!(Instant::now() >= at(told[told.len() - 1]), "{told:?}");
        }
    }
}
