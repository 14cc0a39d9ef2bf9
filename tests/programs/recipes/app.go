// Answers with the method, the path, the query and the length of the body. Listens on descriptor 3.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
)

func answer(response http.ResponseWriter, request *http.Request) {
	length, err := io.Copy(io.Discard, request.Body)
	if err != nil {
		http.Error(response, err.Error(), http.StatusBadRequest)
		return
	}
	fmt.Fprintf(response, "%s %s %s %d\n", request.Method, request.URL.Path, request.URL.RawQuery, length)
}

func main() {
	listener, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(answer)}
	stopped, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	go server.Serve(listener)
	<-stopped.Done()
	server.Shutdown(context.Background())
}
