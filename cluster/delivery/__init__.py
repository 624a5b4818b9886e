"""The way of many answers to the processes that read them: whatever is written at once travels as one message.

A reader has one `Inbox`, a port on its node, and opens a `Feed` in it for every answer that it waits for. It passes the
feed's `Destination` on with its request; whoever writes the answer reaches the inbox through its `Outlets`, which keep
one TCP connection to each inbox however many answers go there.

    writer                                      reader
    Hello {version, token}            ->
                                      <-        {} or {error}
    [[key, item], [key, item], ...]   ->                        what was put in one turn of the writer's event loop

Every message is a length of four bytes and then JSON. Items are any JSON values; nothing here knows what they mean.

**Complete or failed.** Items of one key arrive in the order in which they were put, each once. In the end the reader
learns by its own way, the answer to its request, how many there were (`Receipt`): a feed is over when it has them all,
and fails if they cannot come any more. A connection that breaks fails the feeds that it brought items for, at once, and
what is put into it afterwards; the next `reach` opens another. All items of a feed come over one connection.

**Who may write.** An inbox has a random token; a connection that does not show it is ended. With `Tls` both ends show
certificates before a byte of the above is said.
"""

from cluster.delivery.inbox import Feed, Inbox
from cluster.delivery.messages import Destination, Receipt
from cluster.delivery.outlet import Outlet, Outlets

__all__ = ["Destination", "Feed", "Inbox", "Outlet", "Outlets", "Receipt"]
