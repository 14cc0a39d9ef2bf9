//! A future that runs inside the task of its request, and becomes a task of its own when the request no longer awaits it.
//!
//! An attempt to serve a request usually ends at the moment at which the request is answered. A task of its own would then be
//! an allocation and a wake-up more for each request. An attempt that continues, because the response is long or because the
//! client has left, needs the task, because it must reach its end, even if the gateway drains.

use std::future::Future;
use std::pin::Pin;
use std::task::Context;

use crate::request::outlasting;

/// The future, until it has ended. Dropping this spawns the rest of the future as a task.
pub(super) struct OwnTask(Option<Pin<Box<dyn Future<Output = ()>>>>);

impl OwnTask {
    pub(super) fn new(future: impl Future<Output = ()> + 'static) -> Self {
        Self(Some(Box::pin(future)))
    }

    /// Runs the future as far as possible.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) {
        if let Some(future) = &mut self.0
            && future.as_mut().poll(context).is_ready()
        {
            self.0 = None;
        }
    }
}

impl Drop for OwnTask {
    fn drop(&mut self) {
        // A future that has panicked must not be polled again.
        if let Some(future) = self.0.take().filter(|_| !std::thread::panicking()) {
            outlasting::spawn(future);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::rc::Rc;
    use std::task::{Poll, Waker};

    use tokio::task::{LocalSet, yield_now};

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_future_that_has_not_ended_continues_as_a_task() {
        let steps = Rc::new(Cell::new(0));
        let future = |steps: Rc<Cell<u32>>| async move {
            for step in 1..=3 {
                steps.set(step);
                yield_now().await;
            }
        };
        LocalSet::new()
            .run_until(async {
                let mut attended = OwnTask::new(future(Rc::clone(&steps)));
                attended.poll(&mut Context::from_waker(Waker::noop()));
                assert_eq!(steps.get(), 1);
                drop(attended);
                poll_fn(|context| {
                    context.waker().wake_by_ref();
                    if steps.get() == 3 { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
            })
            .await;
    }

    #[test]
    fn a_future_that_has_ended_needs_no_task() {
        let mut attended = OwnTask::new(async {});
        attended.poll(&mut Context::from_waker(Waker::noop()));
        attended.poll(&mut Context::from_waker(Waker::noop()));
        drop(attended); // outside of a runtime, spawning a task would panic
    }
}
