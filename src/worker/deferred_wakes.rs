//! Wakes tasks after every other runnable task has run, between two polls of epoll.
//!
//! tokio can do this for a task (`yield_now`); this module does it for futures that are polled within a task.

use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Poll, Waker};

thread_local! {
    static DEFERRED: RefCell<Deferred> = RefCell::default();
}

#[derive(Debug, Default)]
struct Deferred {
    wakers: Vec<Waker>,
    /// Waker of [`run`] while it sleeps.
    runner: Option<Waker>,
}

/// Wakes `waker` after the next time that the event loop polls epoll.
pub(crate) fn wake_later(waker: Waker) {
    DEFERRED.with_borrow_mut(|later| {
        later.wakers.push(waker);
        if let Some(runner) = later.runner.take() {
            runner.wake();
        }
    });
}

/// Wakes the deferred wakers. Must run as a task of this thread for as long as the worker is running.
pub(crate) async fn run() {
    loop {
        poll_fn(|context| {
            DEFERRED.with_borrow_mut(|later| {
                if !later.wakers.is_empty() {
                    return Poll::Ready(());
                }
                later.runner = Some(context.waker().clone());
                Poll::Pending
            })
        })
        .await;
        tokio::task::yield_now().await;
        for waker in DEFERRED.with_borrow_mut(|later| std::mem::take(&mut later.wakers)) {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    /// Waits the way a socket does.
    async fn later() {
        let mut asked = false;
        poll_fn(|context| {
            if std::mem::replace(&mut asked, true) {
                return Poll::Ready(());
            }
            wake_later(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    #[tokio::test(flavor = "local")]
    async fn later_comes_after_what_can_be_done_now_and_even_if_that_never_ends() {
        let running = tokio::task::spawn_local(run());
        let count = Rc::new(Cell::new(0));
        let counting = Rc::clone(&count);
        let busy = tokio::task::spawn_local(async move {
            loop {
                counting.set(counting.get() + 1);
                tokio::task::yield_now().await;
            }
        });
        let waiting = tokio::task::spawn_local(later());
        waiting.await.unwrap();
        assert!(count.get() > 0, "the other task came first");
        later().await;
        running.abort();
        busy.abort();
    }
}
